"""Engines: ``map(work, shards)`` on processes of this machine or on a Ray cluster."""
