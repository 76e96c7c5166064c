"""The wide zoo: every model type of the installed transformers, shrunk, run and judged without code per model."""
