"""Noisy injective flows (Cunningham, Zabounidis, Agrawal, Fiterau, Sheldon, 2020)."""
