"""Repairs of trained models: do the uses pass, after how many steps, at what price."""
