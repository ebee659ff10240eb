"""Files a stranger may send: a few kilobytes that declare gigabytes, formats that start programs, pages with scripts."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

SIDE = 60_000  # 3.6 gigapixels


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(side: int = SIDE) -> bytes:
    """A PNG that declares side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
    return start + _chunk(b"IDAT", zlib.compress(bytes(100_000))) + _chunk(b"IEND", b"")


def gif_frames(frames: int = 300, side: int = 2000, frame_side: int = 1) -> bytes:
    """A GIF of many frames on a large canvas, each of which changes few pixels."""
    pixel = b"\x02\x02\x44\x01\x00"  # LZW of one pixel
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, frame_side, frame_side, 0) + pixel
    palette = bytes([0, 0, 0, 255, 255, 255])
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + palette + frame * frames + b"\x3b"


def gif_large_frame(side: int = SIDE) -> bytes:
    """A GIF whose first frame is larger than the picture it declares."""
    return gif_frames(1, 10, side)


def webp_bomb() -> bytes:
    """An animated WebP of small frames on the largest canvas there is, 16384 x 16384."""
    content = webp_frames(2, 8)
    at = content.index(b"VP8X") + 12
    return content[:at] + b"\xff\x3f\0" * 2 + content[at + 6 :]


def webp_frames(frames: int = 200, side: int = 2000) -> bytes:
    """An animated WebP: many equal frames, a few bytes each."""
    pictures = [Image.new("RGB", (side, side), (i, 0, 0)) for i in range(2)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:], lossless=True, quality=0, method=0)
    content = buffer.getvalue()
    at = content.index(b"ANMF")
    size = struct.unpack("<I", content[at + 4 : at + 8])[0]
    frame = content[at : at + 8 + size]
    body = content[12:at] + frame * frames
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _ifd(width: int, height: int, data: int, following: int) -> bytes:
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, data), (277, 3, 1),
            (278, 4, height), (279, 4, 16)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)


def tiff_pages(pages: int = 1, side: int = SIDE) -> bytes:
    """A TIFF of pages that all declare side x side pixels of the same 16 bytes."""
    size = len(_ifd(1, 1, 0, 0))
    at = [24 + page * size for page in range(pages)] + [0]
    body = b"".join(_ifd(side, side, 8, at[page + 1]) for page in range(pages))
    return b"II*\0" + struct.pack("<I", 24) + bytes(16) + body


def bmp_bomb(side: int = SIDE) -> bytes:
    """A BMP that declares side x side pixels."""
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54) + header + bytes(100)


def eps(marker: str = "/tmp/taco-attack") -> bytes:
    """PostScript, for which Pillow would start Ghostscript."""
    return (
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n"
        f"({marker}) (w) file (x) writestring\nshowpage\n%%EOF\n"
    ).encode()


def playlist(target: str = "/etc/hosts") -> bytes:
    """A video that is a list of other files, which FFmpeg would open."""
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nfile://{target}\n#EXT-X-ENDLIST\n".encode()


PICTURES = {
    "PNG of 3.6 gigapixels": ("bomb.png", png_bomb),
    "GIF of 300 frames of 2000 x 2000": ("frames.gif", gif_frames),
    "GIF of 20,000 frames": ("many.gif", lambda: gif_frames(20_000, 8)),
    "GIF whose frame is larger than its canvas": ("large.gif", gif_large_frame),
    "WebP of 268 megapixels": ("bomb.webp", webp_bomb),
    "WebP of 200 frames of 2000 x 2000": ("frames.webp", webp_frames),
    "TIFF of 3.6 gigapixels": ("bomb.tiff", tiff_pages),
    "TIFF of 200 pages of 2000 x 2000": ("pages.tiff", lambda: tiff_pages(200, 2000)),
    "BMP of 3.6 gigapixels": ("bomb.bmp", bmp_bomb),
    "PostScript": ("picture.eps", eps),
    "PostScript called .png": ("eps.png", eps),
}
PAGES = {
    "HTML": "page.html", "SVG": "page.svg", "PDF": "page.pdf", "saved page (MHT)": "page.mht", "MHTML": "page.mhtml",
    "XML": "page.xml", "script": "page.mjs", "XHTML": "page.xhtml",
}  # fmt: skip
