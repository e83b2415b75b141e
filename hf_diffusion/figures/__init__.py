"""Pictures: grids of samples and curves of runs."""
