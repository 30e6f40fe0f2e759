"""Steps that do not wait for late workers: gradient codes, in one step and over several."""
