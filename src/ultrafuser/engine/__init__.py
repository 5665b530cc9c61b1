"""Fast answers: continuous batching over n key-value caches, speculation, one thread that owns the model."""
