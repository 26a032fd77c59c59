"""The recipes that are shipped; ``blip_ft.config.shipped`` finds them here."""
