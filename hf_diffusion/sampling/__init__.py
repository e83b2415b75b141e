"""The one place that draws from a saved pipeline: options, loading, drawing, interpolation."""
