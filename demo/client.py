"""A small ComfyUI client: queue a graph over HTTP, follow it on the websocket."""

from __future__ import annotations

import asyncio
import json
import queue
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp

TEXT = 3  # the binary message that carries a node's status text
_CLOSED = ("closed", None)


class PromptError(Exception):
    """The server refused a graph, or a node of it failed. `details` is what the server said."""

    def __init__(self, message: str, details: Any = None) -> None:
        super().__init__(message)
        self.details = details


class Client:
    """Listens from the start, so no message is missed. Use it as a context manager."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.id = uuid.uuid4().hex
        self.messages: list[tuple[str, Any]] = []  # all that `follow` has seen
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._listening = self._loop.create_task(self._listen())
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Client:
        self._thread.start()
        if not self._ready.wait(30):
            self.__exit__()
            raise ConnectionError(f"no websocket at {self.address}")
        return self

    def __exit__(self, *_: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._listening.cancel)
        self._thread.join(10)

    # --- HTTP

    def get(self, path: str, **query: str) -> Any:
        """The JSON that the server answers."""
        return json.loads(self.get_bytes(path, **query))

    def get_bytes(self, path: str, **query: str) -> bytes:
        address = self.address + path + ("?" + urllib.parse.urlencode(query) if query else "")
        with urllib.request.urlopen(address, timeout=60) as response:
            return response.read()

    def post(self, path: str, content: Any) -> Any:
        """The JSON that the server answers, None where it says nothing."""
        request = urllib.request.Request(
            self.address + path,
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = response.read()
        return json.loads(answer) if answer else None

    def queue(self, graph: Mapping[str, Any]) -> str:
        """Queue a graph in API form; returns the prompt's id. Raises PromptError if refused."""
        try:
            answer = self.post("/prompt", {"prompt": graph, "client_id": self.id})
        except urllib.error.HTTPError as error:
            details = json.loads(error.read() or b"{}")
            raise PromptError(_refusal(details), details) from error
        return answer["prompt_id"]

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def history(self, prompt_id: str) -> dict[str, Any]:
        """What the server remembers of a prompt that has ended."""
        for _ in range(200):  # it is written a moment after the prompt's last message
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.05)
        raise PromptError("the server has no history of the prompt")

    def outputs(self, prompt_id: str) -> dict[str, Any]:
        """What the output nodes showed, by node id."""
        return self.history(prompt_id)["outputs"]

    def image(self, shown: Mapping[str, str]) -> bytes:
        """The file of an image as the server lists it: filename, subfolder, type."""
        return self.get_bytes("/view", **shown)

    # --- websocket

    def follow(self, prompt_id: str, timeout_s: float = 600.0) -> Iterator[tuple[str, Any]]:
        """`(type, data)` of each message until the prompt has ended, in whatever way.

        Messages about other prompts are dropped.

        A node's status text comes as `("text", {"node": ..., "text": ...})`. Raises TimeoutError
        when nothing was heard for `timeout_s`, ConnectionError when the server went away.
        """
        while True:
            try:
                kind, data = self._queue.get(timeout=timeout_s)
            except queue.Empty:
                raise TimeoutError(f"no message from the server for {timeout_s:.0f} s") from None
            if (kind, data) == _CLOSED:
                raise ConnectionError("the server went away")
            if isinstance(data, dict) and data.get("prompt_id", prompt_id) != prompt_id:
                continue
            self.messages.append((kind, data))
            yield kind, data
            if kind in ("execution_success", "execution_error", "execution_interrupted"):
                return

    def run(self, graph: Mapping[str, Any], timeout_s: float = 600.0) -> dict[str, Any]:
        """Queue a graph, wait for its end, and return what its nodes showed.

        Raises PromptError when it was refused, failed or was interrupted.
        """
        prompt_id = self.queue(graph)
        for kind, data in self.follow(prompt_id, timeout_s):
            raise_failure(kind, data)
        return self.outputs(prompt_id)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._listening)
        except (asyncio.CancelledError, OSError, aiohttp.ClientError):
            pass  # `_CLOSED` says it
        finally:
            self._queue.put(_CLOSED)
            self._loop.close()

    async def _listen(self) -> None:
        address = f"{self.address}/ws?clientId={self.id}"
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(address, max_msg_size=0) as socket:
                await self._read(socket)

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            self._ready.set()  # the server greets with a status
            if message.type is aiohttp.WSMsgType.TEXT:
                content = json.loads(message.data)
                self._queue.put((content["type"], content.get("data")))
            elif message.type is aiohttp.WSMsgType.BINARY:
                text = _status_text(message.data)
                if text is not None:
                    self._queue.put(("text", text))


def _status_text(message: bytes) -> dict[str, str] | None:
    """Node and text of a status text message, None for another kind of message."""
    if len(message) < 8 or struct.unpack(">I", message[:4])[0] != TEXT:
        return None
    length = struct.unpack(">I", message[4:8])[0]
    node, text = message[8 : 8 + length], message[8 + length :]
    return {"node": node.decode(), "text": text.decode("utf-8", "replace")}


def raise_failure(kind: str, data: Any) -> None:
    """Raise PromptError for a message by which a prompt ends other than well."""
    if kind == "execution_error":
        where = f"{data.get('node_type')} ({data.get('node_id')})"
        raise PromptError(f"{where}: {str(data.get('exception_message', '')).strip()}", data)
    if kind == "execution_interrupted":
        raise PromptError("interrupted", data)


def _refusal(details: Mapping[str, Any]) -> str:
    lines = [str(details.get("error", {}).get("message", "refused"))]
    for node_id, problem in details.get("node_errors", {}).items():
        for error in problem.get("errors", []):
            where = f"{problem.get('class_type')} ({node_id})"
            lines.append(f"{where}: {error.get('message')}: {error.get('details')}")
    return "\n".join(lines)
