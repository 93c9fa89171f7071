"""Photos on object storage, at addresses like s3://bucket/train2014/COCO_train2014_000000000009.jpg.

DALI's own reader fetches them; nothing else is needed. Server, region and credentials are where the AWS SDK looks for
them (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ~/.aws/credentials, ...) and nowhere else: no option, file or message of
nemo_dali holds any. The SDK tries a request AWS_MAX_ATTEMPTS times (3), and gives up an attempt after a second without
a connection or three seconds without a byte. It listens forever to a server that sends a byte now and then, so the code
here waits for DALI only for a limited time, and abandons the pipeline if nothing comes.
"""

import ctypes
import errno
import functools
import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from nemo_dali.data.columns import is_inside
from nemo_dali.errors import NemoError, PhotoError

T = TypeVar("T")

LONGEST_READ = 60  # seconds for one object, the SDK's attempts included
SILENT = ("5", "6", "7", "28", "52")  # curl's codes for a server that is not found, not there, or says nothing
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
REFUSED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "RequestTimeTooSkewed")
CERTIFICATES = "/etc/pki/tls/certs/ca-bundle.crt"  # where DALI's wheel looks for them, whatever the system


def is_remote(path: str) -> bool:
    """Whether a path or an image root is an address, not in this machine's file system."""
    return "://" in path


def image_root(given: str | Path) -> str:
    """An image root as it is kept: an absolute path, or an address without a slash at its end.

    Raises:
        ValueError: an address that is not s3://bucket/prefix.
    """
    root = re.sub(r"^([a-z0-9]+):/(?!/)", r"\1://", str(given))  # pathlib makes one slash of two
    if not is_remote(root):
        return os.path.abspath(root)
    root = root.rstrip("/")
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket)
    if not root.startswith("s3://") or name is None or (prefix and not is_inside(prefix)) or not _readable(prefix):
        shown = re.sub(r"(?<=//).*@|[?#].*", "…", root)  # where people put credentials
        raise ValueError(
            f"images ({shown!r}) must be a folder or s3://bucket/prefix, without credentials, '?', '#' and '..'"
        )
    return root


def check_names(root: str, names: Iterable[str]) -> None:
    """Refuse photos that cannot be read at an address, or would be mistaken for others.

    Raises:
        PhotoError: naming the first.
        NemoError: the server's own address holds credentials.
    """
    if is_remote(root) and "@" in os.environ.get("AWS_ENDPOINT_URL", ""):
        raise NemoError(
            "AWS_ENDPOINT_URL holds a user's name or password, which the AWS SDK takes for the server's. Move them "
            "to AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    if is_remote(root) and (name := next((name for name in names if not _readable(name)), None)) is not None:
        raise PhotoError(
            f"The photo {name} cannot be read from {root}: DALI treats '?' and '#' as the end of an address. Rename "
            "it, in the annotations too, or use a local copy of the photos with images=... or --images."
        )


def _readable(name: str) -> bool:
    return "?" not in name and "#" not in name


def failed_address(error: object) -> str | None:
    """The address of the object that DALI failed at, if its message says."""
    found = re.search(r"S3 Object not found\. bucket=(\S+) object=(.*):\n", str(error))
    return f"s3://{found[1]}/{found[2]}" if found is not None else None


def scrubbed(text: str) -> str:
    """A text from DALI or a server without this process's credentials, which a server may have sent back."""
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "…")
    return re.sub(r"(?<=//)[^/\s]*@|(?<=[?&])X-Amz-[^\s&]*", "…", text)


class Waiting(Generic[T]):
    """A call into DALI that may never return, made in a thread of its own.

    The process does not wait for it when it ends.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._done = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="nemo-dali object storage", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error
        self._done.set()

    def ends_within(self, seconds: float) -> bool:
        """Wait for the call, and return whether it has ended; an interrupt ends the wait."""
        return self._done.wait(seconds)

    def result(self) -> T:
        """Return what the call returned, or raise what it raised, once it has ended."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # it holds this frame
        return self._result  # type: ignore[return-value]  # of type T by then


def abandon(pipeline: Any) -> None:
    """Abandon a DALI pipeline whose threads wait for a server: shutting it down would wait for them.

    Its memory and threads stay, until the server is done or the process ends; what they write into must be kept.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipeline._pipe))  # never destroyed
    pipeline._pipe = None
    _end_without_destructors()


@functools.cache
def _end_without_destructors() -> None:
    """Let the process end right after Python's own end, with its exit status.

    DALI's destructor of the S3 client would wake the waiting threads, which would look for a Python gone by then.
    """
    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)


def read_object(address: str) -> bytes:
    """The bytes of a photo at an address.

    Raises:
        FileNotFoundError: there is no such object, though its bucket can be listed.
        OSError: the server does not answer, or not now; another try may succeed. Or it announces more bytes than fit in
            memory.
        NemoError: nothing can be read there: no such bucket, or credentials or certificates are not accepted.
    """
    # The server says why it refuses a listing, but not an object. If it lists, it may just have been busy: try again.
    for _ in range(2):
        read = _try(lambda: _read(address), address)
        if isinstance(read, bytes):
            return read
        _raise_refusal(address, read)
    raise FileNotFoundError(errno.ENOENT, "No such object, or not visible to these credentials", address)


def _raise_refusal(address: str, text: str) -> None:
    """Raise why DALI could not read an object, as it said or as a listing says; return if the object is missing."""
    if "bad_alloc" in text:
        raise OSError(errno.EFBIG, "The server announces more bytes than fit in memory", address)
    if "curlCode" not in text:
        listed = _try(lambda: _list(address), address)
        if not isinstance(listed, str) or "No files found" in listed:
            return
        text = listed
    where = "Say where the photos are with images=... or --images, or check AWS_ENDPOINT_URL."
    if (curl := re.search(r"curlCode: (\d+), ([^;\n]*)", text)) is not None:
        if curl[1] in ("60", "77"):
            raise NemoError(
                f"The photo {address} cannot be read: the server's certificate cannot be verified. DALI trusts those "
                f"in {CERTIFICATES}: link the system's there (/etc/ssl/certs/ca-certificates.crt)."
            )
        if curl[1] in SILENT:
            raise TimeoutError(errno.ETIMEDOUT, f"The server does not answer ({curl[2].lower()})", address)
        raise OSError(errno.EIO, f"The server's answer cannot be used ({curl[2].lower()})", address)
    code = found[1] if (found := re.search(r"^(\w+): ", text, re.MULTILINE)) is not None else "no reason given"
    if code == "NoSuchBucket":
        raise NemoError(f"The photo {address} cannot be read: there is no such bucket. {where}")
    if code in REFUSED:
        raise NemoError(
            f"The photo {address} cannot be read: the server refuses the credentials ({code}). Set AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY, or fix ~/.aws/credentials."
        )
    if code == "AccessDenied":
        raise NemoError(
            f"The photo {address} cannot be read: it does not exist, or these credentials may not read it ({code}). "
            "Use some that may read it and list its bucket, so that a missing photo can be recognised."
        )
    raise OSError(errno.EIO, f"The server refuses to give it ({code})", address)


def _try(read: Callable[[], bytes], address: str) -> bytes | str:
    """The bytes, or what DALI says instead of them. No exception is kept: its frames would hold a pipeline."""
    try:
        return read()
    except RuntimeError as error:
        return scrubbed(str(error).partition("encountered:")[2].strip())
    except TimeoutError as error:
        raise TimeoutError(errno.ETIMEDOUT, str(error), address) from None


def _read(address: str) -> bytes:
    from nvidia.dali import fn, types

    name = np.frombuffer(os.fsencode(address), np.uint8)
    return _run(lambda: fn.io.file.read(types.Constant(name, device="cpu"), dont_use_mmap=True))


def _list(address: str) -> bytes:
    """Read the first object below this address, as if it were a folder."""
    from nvidia.dali import fn

    return _run(lambda: fn.readers.file(file_root=address)[0])


def _run(graph: Callable[[], Any]) -> bytes:
    from nvidia.dali import Pipeline

    pipe = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipe:
        pipe.set_outputs(graph())
    pipe.build()
    running = Waiting(pipe.run)
    if not running.ends_within(LONGEST_READ):
        abandon(pipe)
        raise TimeoutError(f"The server did not send it within {LONGEST_READ} s")
    (output,) = running.result()
    return np.asarray(output[0]).tobytes()
