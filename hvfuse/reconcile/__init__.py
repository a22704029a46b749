"""Two copies of a disk made the same by comparing digests of their blocks: one algorithm for every such job."""
