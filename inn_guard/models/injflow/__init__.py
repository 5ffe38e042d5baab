"""InjFlow, a relaxed injective flow, and the autoencoders that it is compared with."""
