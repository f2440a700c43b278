"""What file systems raise, in sentences, and the one distinction that matters: is the file at fault, or its place?"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT)
# botocore and aiohttp are known by their names only, so that a local run does not import them.
_UNKNOWN = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"}
_REFUSED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidClientTokenId"}  # some come as 400
_SILENT = {"EndpointConnectionError", "ConnectTimeoutError"}
_BROKEN = {"HTTPClientError", "IncompleteReadError", "ClientPayloadError", "ResponseParserError", "TimeoutError"}

# As torch and the libraries under it say it; none of them is imported here.
_DEVICE = re.compile(
    r"\b(CUDA|HIP|cuDNN|cuBLAS|NCCL|RCCL)( driver)? error|\bTriton Error \["
    r"|\b(CUBLAS|CUDNN|CUFFT|CUSOLVER|CUSPARSE|HIPBLAS|MIOPEN)_STATUS_|\b(cuda|hip)Error[A-Z]",
    re.IGNORECASE,
)
_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED|MemoryAllocation", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small, of a device or of the machine; fewer rows at a time may fit."""
    named = isinstance(error, MemoryError) or "OutOfMemoryError" in _classes(error)
    return named or (isinstance(error, RuntimeError) and bool(_MEMORY.search(str(error))))


def is_device_error(error: BaseException) -> bool:
    """Whether a device failed, other than for want of memory: its process can do nothing more on it."""
    named = "AcceleratorError" in _classes(error)
    said = isinstance(error, RuntimeError) and bool(_DEVICE.search(str(error)))
    return (named or said) and not is_out_of_memory(error)


def _classes(error: BaseException) -> set[str]:
    return {each.__name__ for each in type(error).__mro__}


class UnavailableError(ConnectionError, PermissionError):
    """The place and not the file is at fault: a server that fails or refuses us, or a full disk.

    Whoever notes what is wrong with a file must let this pass: the file may be well, and the next run may have it.
    """


class HaltError(UnavailableError):
    """Who meets it does no more: a bound that was set is reached. Its sentence says which, and how to go on later."""


@contextmanager
def explained(url: str, local: bool) -> Iterator[None]:
    """Turn the errors of a file system about `url` into sentences; UnavailableError where its place is at fault."""
    try:
        yield
    except UnavailableError:
        raise
    except IsADirectoryError:
        raise IsADirectoryError(f"{url} is a folder. Give the name of a file.") from None
    except FileExistsError:
        raise FileExistsError(f"{url} already exists.") from None
    except NotADirectoryError:
        raise NotADirectoryError(f"{url} cannot be: a part of this path is a file. Give a folder.") from None
    except FileNotFoundError as error:
        if error.errno is None and url in str(error):
            raise  # already a sentence of ours
        if "bucket" in str(error).lower():
            raise FileNotFoundError(f"The bucket of {url} does not exist. Create it, or check the name.") from None
        raise FileNotFoundError(f"{url} does not exist.") from None
    except Exception as error:
        if trouble := _trouble(url, error, local):
            raise UnavailableError(trouble) from None
        if isinstance(error, PermissionError):
            raise PermissionError(f"Access to {url} was denied. Check its permissions.") from None
        raise


def _trouble(url: str, error: Exception, local: bool) -> str | None:
    if getattr(error, "errno", None) in _FULL:
        return f"There is no room left for {url}. Free some space, then give the same command again."
    if local:
        return None
    kinds = _classes(error)
    status, code = _answer(error)
    if kinds & _UNKNOWN:
        advice = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role."
        return f"No credentials were found for {url}. {advice}"
    if isinstance(error, PermissionError) or code in _REFUSED:
        why = f" ({code})" if code and not code.isdigit() else ""
        return f"Access to {url} was denied{why}. Check its permissions or your credentials."
    if kinds & _SILENT:
        return f"The server of {url} does not answer. Check AWS_ENDPOINT_URL and the network."
    if kinds & _BROKEN or status >= 500 or status == 429:
        told = " ".join(str(error).split())[:200] or type(error).__name__
        return f"The server of {url} failed again and again: {told}. Give the same command again when it is well."
    return None


def _answer(error: BaseException) -> tuple[int, str]:
    """The status and the code of a server's refusal; 0 and nothing where it is something else."""
    response: Any = getattr(error if hasattr(error, "response") else error.__cause__, "response", None)
    if not isinstance(response, dict):
        return 0, ""
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), str(response.get("Error", {}).get("Code", ""))
