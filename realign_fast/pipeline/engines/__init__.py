"""Engines: ``engine(task, shards)``, on processes of this machine or on a Ray cluster."""
