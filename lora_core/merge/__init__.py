"""LoRAs made of LoRAs: in factors wherever that is exact, one layer at a time."""
