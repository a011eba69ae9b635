"""Runs that put the rooms together: train, measure, quantise, compare, report."""
