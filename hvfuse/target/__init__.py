"""The target: the store of replica images, journal and recovery points, and views of any point."""
