"""The table of operators, and the modules that torch.nn lacks."""
