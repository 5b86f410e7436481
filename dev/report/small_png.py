"""
A screenshot in a third of its bytes: of a page's colours the 256 most frequent stay, every other one becomes
the nearest of them, and a pixel is a byte.

PNG (ISO/IEC 15948): a row is a filter's number and the differences that it left; reading adds them up, and
rows of palette indices are written without a filter.
"""

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_COLOURS = 256


def chunks(data):
    at = len(SIGNATURE)
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        yield kind, data[at + 8 : at + 8 + size]
        at += size + 12


def unfilter(kind, row, above, step):
    """
    row[i] += a prediction from a = left, b = above, c = above left (bytes, modulo 256); `step` bytes a pixel
    """
    if kind == 0:
        return row
    if kind == 2:
        return (row.astype(int) + above).astype(np.uint8)
    x, b = row.tolist(), above.tolist()
    for i in range(len(x)):
        a, c = (x[i - step], b[i - step]) if i >= step else (0, 0)
        if kind == 1:
            guess = a
        elif kind == 3:
            guess = (a + b[i]) // 2
        else:  # Paeth: the neighbour that is nearest to a + b - c
            to_a, to_b, to_c = abs(b[i] - c), abs(a - c), abs(a + b[i] - 2 * c)
            guess = a if to_a <= to_b and to_a <= to_c else b[i] if to_b <= to_c else c
        x[i] = (x[i] + guess) & 255
    return np.array(x, np.uint8)


def read(data):
    """-> [height, width, 3], of the truecolour PNGs with 8 bits that browsers write"""
    parts = {}
    for kind, body in chunks(data):
        parts[kind] = parts.get(kind, b"") + body
    width, height, depth, colour = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    if data[:8] != SIGNATURE or depth != 8 or colour not in (2, 6) or parts[b"IHDR"][12] != 0:
        raise ValueError("not a truecolour PNG of 8 bits")
    step = 3 if colour == 2 else 4
    packed = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, 1 + step * width)
    above, rows = np.zeros(step * width, np.uint8), []
    for row in packed:
        above = unfilter(int(row[0]), row[1:], above, step)
        rows.append(above)
    return np.stack(rows).reshape(height, width, step)[:, :, :3]


def palette_of(image):
    """-> palette [n, 3], index [height, width]"""
    colours, index, count = np.unique(image.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    kept = np.argsort(-count, kind="stable")[:MOST_COLOURS]
    palette = colours[kept].astype(int)
    nearest = [int(((palette - colour) ** 2).sum(1).argmin()) for colour in colours.astype(int)]
    return palette.astype(np.uint8), np.array(nearest, np.uint8)[index.ravel()].reshape(image.shape[:2])


def smaller(data):
    """-> the PNG with a palette"""
    palette, index = palette_of(read(data))
    height, width = index.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), index], 1).tobytes()
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette.tobytes()),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    ]
    return SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )
