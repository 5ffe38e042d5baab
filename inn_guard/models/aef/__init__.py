"""Autoencoders within flows (AEF), and the VAE that they are compared with."""
