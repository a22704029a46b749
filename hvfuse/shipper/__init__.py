"""The shipper: turns sealed logs into coalesced, compressed cycles and gives them to a replica."""
