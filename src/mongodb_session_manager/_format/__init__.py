"""What is stored: documents, values and statements. Pure: neither the driver nor asyncio is imported."""
