"""Number formats as pure functions on tensors, one file a format."""
