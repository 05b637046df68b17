"""The storage format: documents, values and statements. Pure: it imports neither the driver nor asyncio."""
