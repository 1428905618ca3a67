"""An OpenAI-compatible server on loopback that answers, refuses, delays and breaks as a test tells it to."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Loopback(ThreadingHTTPServer):
    """POST /v1/chat/completions -> what `self.act(request, number)` says: a text, or (status, headers, words), "cut", "garbage", "shape",
    "late" (after eight seconds), (finish_reason, text). Everything that was asked is in `seen`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen, self.keys, self.under_way, self.most, self.lock = [], [], 0, 0, threading.Lock()
        self.act = lambda request, number: "fine"
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        s = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with s.lock:
            s.seen.append(request)
            s.keys.append(self.headers["Authorization"])
            s.under_way += 1
            s.most, number = max(s.most, s.under_way), len(s.seen)
        try:
            action = s.act(request, number) if self.path == "/v1/chat/completions" else (404, {}, "no such path")
        finally:
            with s.lock:
                s.under_way -= 1
        if action == "cut":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        elif action == "late":
            time.sleep(8)
            self.reply("too late", "stop")
        elif action == "garbage":
            self.send(200, b"<html>not today")
        elif action == "shape":
            self.send(200, b'{"object": "list", "data": []}')
        elif isinstance(action, tuple) and isinstance(action[0], int):
            status, headers, words = action
            self.send(status, json.dumps({"error": {"message": words}}).encode(), headers)
        else:
            self.reply(*(action[::-1] if isinstance(action, tuple) else (action, "stop")))

    def reply(self, text, finish):
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge-1", "choices": [choice], "usage": usage}
        self.send(200, json.dumps(whole).encode())

    def send(self, status, body, headers=()):
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **dict(headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass  # whoever asked has gone

    def log_message(self, *words):
        pass


def no_pauses():
    """In a child process: pauses between retries take no time."""
    import eval.server as server_file

    async def at_once(seconds):
        pass

    server_file.sleep = at_once
