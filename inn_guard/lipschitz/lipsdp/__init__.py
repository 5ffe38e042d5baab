"""LipSDP without an SDP solver: chains of linear maps and slopes, and multipliers that prove."""
