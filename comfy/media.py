"""Opening pictures, videos and sounds that may come from strangers.

Only formats in a list are tried, because others start programs (Ghostscript for EPS), read other files (playlists) or have
decoders that nobody looks after. What a file declares is compared with the limits before anything is decoded: a few
kilobytes can declare gigabytes. Limits are flags of the command line; the errors name them.

    with media.open_picture(path) as picture: ...
    with media.open_container(path) as container: ...
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
from collections.abc import Iterator
from typing import IO, Any

from comfy.cli_args import args

# JPEG includes MPO, which many cameras write as .jpg; HEIF is there when a package for it is installed
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "QOI", "ICO", "HEIF")
# FFmpeg's names of demuxers, none of which opens a further file
CONTAINER_FORMATS = (
    "mov", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "h264", "hevc", "flv", "asf", "ogg", "wav", "w64", "flac",
    "mp3", "aac", "ac3", "eac3", "aiff", "caf", "amr", "dv", "mxf", "nut", "ivf", "obu", "gif", "apng", "au",
)  # fmt: skip
BYTES_PER_PIXEL = 16  # three colours and transparency as float32
GIB = 2**30
_GIF_EXTENSION, _GIF_FRAME = 0x21, 0x2C


class MediaError(ValueError):
    """A file is not opened: its format is not in the list, or it is larger than the limits."""


def _named(file: Any, name: str | None) -> str:
    return name or (os.path.basename(file) if isinstance(file, str | os.PathLike) else "the file")


def video_bytes() -> int:
    """Most bytes that one decoded video or sound may take."""
    if args.max_video_gib is not None:
        return int(args.max_video_gib * GIB)
    import psutil

    return max(int(args.max_image_gib * GIB), psutil.virtual_memory().total // 4)


def check_size(name: str, width: int, height: int) -> None:
    """Raises MediaError for a picture of more pixels than --max-image-pixels."""
    if width * height > args.max_image_pixels:
        raise MediaError(
            f"{name} declares {width} x {height}, more than {args.max_image_pixels} pixels; use a smaller one, or start "
            "with a higher --max-image-pixels"
        )


def _check_frames(name: str, frames: int, pixels: int) -> None:
    """Raises MediaError for more frames, or more pixels in all frames, than allowed."""
    if frames > args.max_image_frames:
        raise MediaError(
            f"{name} has more than {args.max_image_frames} frames; use a shorter one, or start with a higher "
            "--max-image-frames"
        )
    size = pixels * BYTES_PER_PIXEL
    if size > args.max_image_gib * GIB:
        raise MediaError(
            f"{name} would take {size / GIB:.1f} GiB of memory in {frames} frames, more than {args.max_image_gib:g} GiB; use "
            "a smaller one, or start with a higher --max-image-gib"
        )


def configure() -> None:
    """Give Pillow the limit in pixels that the flags say, for node packs that open pictures themselves."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = args.max_image_pixels


@contextlib.contextmanager
def open_picture(file: str | os.PathLike[str] | IO[bytes], name: str | None = None) -> Iterator[Any]:
    """A Pillow image, not decoded yet, whose size and frames are within the limits; closed at the end of `with`.

    `name` is what errors call it. Raises MediaError, FileNotFoundError, and OSError for a damaged file.
    """
    name = _named(file, name)
    with contextlib.ExitStack() as opened:
        stream = opened.enter_context(open(file, "rb")) if isinstance(file, str | os.PathLike) else file
        picture = opened.enter_context(_opened(stream, name))
        check_picture(picture, name)
        yield picture


def _opened(stream: IO[bytes], name: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    import node_helpers

    Image.init()
    formats = [known for known in PICTURE_FORMATS if known in Image.OPEN]
    try:
        return node_helpers.pillow(lambda source: Image.open(source, formats=formats), stream)
    except UnidentifiedImageError:
        raise MediaError(f"{name} is not a picture of a format that is opened ({', '.join(formats)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+", str(error))
        raise MediaError(
            f"{name} declares {pixels[0] if pixels else 'too many'} pixels, more than {args.max_image_pixels}; use a smaller "
            "one, or start with a higher --max-image-pixels"
        ) from None


def check_picture(picture: Any, name: str) -> None:
    """Raises MediaError for an opened picture that is above the limits in size, frames, or both together."""
    check_size(name, *picture.size)
    if picture.format == "GIF":
        frames, width, height = _gif_frames(picture.fp, args.max_image_frames)
        check_size(name, width, height)
        _check_frames(name, frames, frames * max(width * height, picture.width * picture.height))
    elif picture.format in ("TIFF", "MPO"):  # frames have sizes of their own
        pixels = frames = 0
        for frames in range(1, args.max_image_frames + 2):
            try:
                picture.seek(frames - 1)
            except EOFError:
                frames -= 1
                break
            check_size(name, *picture.size)
            pixels += picture.width * picture.height
        picture.seek(0)
        _check_frames(name, frames, pixels)
    else:
        frames = getattr(picture, "n_frames", 1)
        _check_frames(name, frames, frames * picture.width * picture.height)


def _gif_frames(file: IO[bytes], most: int) -> tuple[int, int, int]:
    """(frames, but not counted further than `most` + 1, largest right and bottom edge) of a GIF, without decoding it.

    Pillow counts them without a limit, and a frame may be larger than the file says its pictures are.
    """
    before = file.tell()
    try:
        file.seek(6)
        width, height, flags = struct.unpack("<HHBxx", file.read(7))
        _skip_palette(file, flags)
        frames = 0
        while frames <= most:
            kind = file.read(1)
            if kind == bytes([_GIF_EXTENSION]):
                file.read(1)
            elif kind == bytes([_GIF_FRAME]):
                left, top, across, down, flags = struct.unpack("<HHHHB", file.read(9))
                width, height = max(width, left + across), max(height, top + down)
                frames += 1
                _skip_palette(file, flags)
                file.read(1)
            elif kind != b"\0":  # the end, or damaged
                break
            else:
                continue
            _skip_blocks(file)
    except struct.error:  # cut off
        pass
    finally:
        file.seek(before)
    return max(frames, 1), width, height


def _skip_palette(file: IO[bytes], flags: int) -> None:
    if flags & 0x80:
        file.seek(3 * 2 ** ((flags & 7) + 1), os.SEEK_CUR)


def _skip_blocks(file: IO[bytes]) -> None:
    while size := file.read(1):
        if size == b"\0":
            return
        file.seek(size[0], os.SEEK_CUR)


# ---- videos and sounds ---------------------------------------------------------------------------------------------


def open_container(file: str | os.PathLike[str] | io.BytesIO, name: str | None = None) -> Any:
    """A PyAV container to read from; use it in `with`. Raises MediaError for formats that are not in the list."""
    import av

    options = {"format_whitelist": ",".join(CONTAINER_FORMATS), "protocol_whitelist": "file"}
    try:
        return av.open(os.fspath(file) if not isinstance(file, io.BytesIO) else file, mode="r", options=options)
    except (av.InvalidDataError, av.ArgumentError) as error:
        raise MediaError(
            f"{_named(file, name)} is not a video or sound of a format that is opened ({error.strerror}); convert it to "
            "mp4, webm, flac or mp3"
        ) from error


class DecodedBytes:
    """Adds up what is decoded of one file. `take` raises MediaError when it gets above --max-video-gib."""

    def __init__(self, name: Any) -> None:
        self._name = name if isinstance(name, str) else "the video"
        self._most = video_bytes()
        self._taken = 0

    def take(self, size: int) -> None:
        """Count `size` bytes that are about to be kept."""
        self._taken += size
        if self._taken > self._most:
            raise MediaError(
                f"{os.path.basename(self._name)} would take more than {self._most / GIB:.1f} GiB of memory; use a shorter or "
                "smaller one, or start with a higher --max-video-gib"
            )

    def frame(self, width: int, height: int) -> None:
        """Count a frame of a video, kept as float32 with three colours. Raises MediaError also for its size."""
        check_size(os.path.basename(self._name), width, height)
        self.take(width * height * 3 * 4)

    def declared(self, frames: int, width: int, height: int) -> None:
        """Refuse a video by what it declares (0 frames: unknown), before the first frame is decoded."""
        check_size(os.path.basename(self._name), width, height)
        if frames > 0:
            self.take(frames * width * height * 3 * 4)
            self._taken = 0
