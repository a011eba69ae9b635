"""Studies, which use all other packages: train, measure, quantize, compare and report."""
