"""What rounding does to an inverse: forecasts against measurements."""
