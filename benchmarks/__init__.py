"""What SING costs beside torch's AdamW: time, memory, imports. ``python -m benchmarks --help``."""
