"""The control plane: home directory, configuration, durable records, supervision, status."""
