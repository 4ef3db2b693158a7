"""What batchpipe costs beside doing without it. Not part of the package; `docs/performance.md` explains each one."""
