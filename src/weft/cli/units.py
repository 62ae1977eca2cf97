"""Numbers as people read them."""


def size_text(num_bytes: int) -> str:
    """1536 -> "1.5K"; powers of 1024, as pool.yaml writes them."""
    value = float(num_bytes)
    for unit in ("B", "K", "M", "G"):
        if value < 1024:
            return f"{value:.0f}{unit}" if unit == "B" or value >= 100 else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}T"
