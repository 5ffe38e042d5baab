"""Branch and bound of Lipschitz constants on boxes of up to four dimensions."""
