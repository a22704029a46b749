"""Byte layouts: disk images (raw, VHD), replication logs ([MS-HRL]) and hvfuse's own companions."""
