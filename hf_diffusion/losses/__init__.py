"""What networks are trained by, as functions of tensors; an objective says whose turn it is."""
