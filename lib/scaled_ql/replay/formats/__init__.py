"""Other people's data: importers and an exporter. Nothing that reads a store imports this package."""
