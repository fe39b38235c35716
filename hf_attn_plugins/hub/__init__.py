"""A repository for the `kernels` package, written from this package's own files; see docs/serving.md."""
