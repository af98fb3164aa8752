"""What an inference costs: operation counts (energy models and chip mappings read these)."""
