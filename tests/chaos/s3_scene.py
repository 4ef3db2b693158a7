"""A run from and to a real S3 store, over a line that can be disturbed."""

from pathlib import Path
from typing import Any

from tests.chaos.poison import Poison
from tests.chaos.scene import Scene
from tests.s3_proxy import Proxy
from tests.s3_server import S3Server

PATIENCE = {"retries": {"total_max_attempts": 3}, "read_timeout": 3}


class S3Scene(Scene):
    """The same run with its inputs and its output in a bucket of its own."""

    def __init__(self, folder: Path, poison: Poison, server: S3Server, proxy: Proxy) -> None:
        self.server = server
        self.proxy = proxy
        self.bucket = folder.name
        super().__init__(folder, poison)
        keys = {"AWS_ACCESS_KEY_ID": server.key, "AWS_SECRET_ACCESS_KEY": server.secret}
        self.environment |= {**keys, "AWS_ENDPOINT_URL": proxy.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        server.make_bucket(self.bucket)
        for path in self.inputs.iterdir():
            self.put(f"in/{path.name}", path.read_bytes())

    def document(self) -> dict[str, Any]:
        job = super().document()
        job["input"]["uri"] = f"s3://{self.bucket}/in/*.csv"
        job["output"]["uri"] = self.out
        job["storage_options"] = {"s3": {"config_kwargs": PATIENCE}}
        return job

    def close(self) -> None:
        super().close()
        self.server.remove_bucket(self.bucket)

    def put(self, key: str, data: bytes) -> None:
        self.server.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    @property
    def pending(self) -> str:
        return "upload "

    def lapse_lock(self) -> None:
        self.server.client.delete_object(Bucket=self.bucket, Key="out/_batchpipe/lock")

    def unjournaled(self) -> list[str]:
        """Uploads that no segment of the journal names."""
        journal = b"".join(data for name, data in self.hidden().items() if "/journal/0" in name).decode()
        return [f"upload {key} {id_}" for key, id_ in self.server.list_uploads(self.bucket) if id_ not in journal]

    @property
    def out(self) -> str:
        return f"s3://{self.bucket}/out"

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"s3": self.server.storage_options}

    def published(self) -> dict[str, bytes]:
        return {name: data for name, data in self.objects("out/").items() if not name.startswith("_batchpipe/")}

    def hidden(self) -> dict[str, bytes]:
        return self.objects("out/_batchpipe/")

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Name and content of everything below a prefix; what goes while it is read is left out."""
        client, found = self.server.client, {}
        for key in self.server.list_keys(self.bucket):
            if key.startswith(prefix):
                try:
                    found[key.removeprefix(prefix)] = client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
                except client.exceptions.NoSuchKey:
                    continue
        return found
