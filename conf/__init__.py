"""The configs, one folder a group; `pkg://hasten.conf` in Hydra's terms."""
