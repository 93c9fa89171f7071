"""Crops: squares that cover a photo, in which a model sees small things that the whole photo hides from it.

+-----+-----+      +---+---+---+      two by two squares of three quarters of the photo's shorter side, and three
|     |     |      +---+---+---+      by three of 0.55 of it, evenly spread from edge to edge: neighbours overlap
+-----+-----+      +---+---+---+      in photos up to 3:2
|     |     |      +---+---+---+
+-----+-----+
"""

GRIDS = ((2, 0.75), (3, 0.55))  # squares each way, and their side as a share of the photo's shorter side
CROPS = sum(count**2 for count, _ in GRIDS)


def crop_box(width: int, height: int, place: int) -> tuple[int, int, int, int]:
    """Crop number ``place`` of a photo: x0, y0, x1, y1 in pixels, the last two exclusive."""
    if not 0 <= place < CROPS:
        raise ValueError(f"place ({place}) must be from 0 to {CROPS - 1}")
    (count, share), *larger = GRIDS
    for following in larger:
        if place >= count**2:
            place, (count, share) = place - count**2, following
    side = max(round(share * min(width, height)), 1)
    row, column = divmod(place, count)
    x, y = round((width - side) * column / (count - 1)), round((height - side) * row / (count - 1))
    return x, y, x + side, y + side
