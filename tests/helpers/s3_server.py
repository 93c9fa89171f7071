"""A real S3 server for tests: moto's, on loopback. Run as a program it serves until its standard input ends.

python -m tests.helpers.s3_server PORT      0: any free port; its number is the first line of the output
"""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ACCESS_KEY, SECRET_KEY = "AKIATESTTESTTESTTEST", "some+secret/that=nobody+may/read"


class S3Server:
    """The program as a child process, and boto3's client for it. What it holds is lost when it stops."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.helpers.s3_server", str(self.port)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def client(self, service: str = "s3") -> Any:
        import boto3

        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )

    def put_folder(self, folder: Path, bucket: str, prefix: str) -> None:
        """Put all files below a folder into a new bucket."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for path in folder.rglob("*"):
            if path.is_file():
                client.put_object(Bucket=bucket, Key=prefix + str(path.relative_to(folder)), Body=path.read_bytes())

    def fail_next(self, *faults: int | str) -> None:
        """What the next requests get instead of an answer: a status, or "hang" for silence."""
        self._post("/faults", json.dumps(faults))

    def check_credentials(self, check: bool) -> None:
        """Set whether requests must be signed by a user that the server knows and that has permission."""
        self._post("/moto-api/reset-auth", "0" if check else "inf")

    def add_user(self, name: str, *, may_read: bool) -> dict[str, str]:
        """A new user's credentials, as variables of the environment."""
        iam = self.client("iam")
        iam.create_user(UserName=name)
        if may_read:
            statement = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
            document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
            iam.put_user_policy(UserName=name, PolicyName="read", PolicyDocument=document)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def _post(self, path: str, body: str) -> None:
        headers = {"Content-Type": "text/plain"}
        request = urllib.request.Request(self.endpoint + path, body.encode(), headers, method="POST")
        urllib.request.urlopen(request, timeout=10).close()


def _serve(port: int) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    s3: Any = DomainDispatcherApplication(create_backend_app)
    faults: list[int | str] = []

    def application(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/faults":
            faults[:] = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        elif faults:
            fault = faults.pop(0)
            if fault == "hang":
                time.sleep(30)
            start(f"{fault} Fault", [("Content-Length", "0")])
            return []
        else:
            return s3(environ, start)
        start("200 OK", [("Content-Length", "0")])
        return []

    server = make_server("127.0.0.1", port, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.port, flush=True)
    sys.stdin.read()  # ends when the parent does, however that ends
    os._exit(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
