"""Studies, which use all other packages: train, measure, quantise, compare and report."""
