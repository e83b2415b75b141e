"""A small Hugging Face Hub on loopback, for tests.

It speaks enough of the Hub's HTTP API for the real, unmodified `huggingface_hub` client (and
diffusers, transformers, datasets on top of it) to create repositories, push, list, tag and pull,
with HF_ENDPOINT pointing here.

with HubServer("/tmp/hub") as hub:
    env = {**os.environ, **hub.env("hf_alice_write", home="/tmp/empty")}
    subprocess.run([...], env=env)  # a client, in its own process
    hub.faults.add(match="POST .*/commit/", action="status", status=503)

or  python -m tests.hub_server --root /tmp/hub --port 8899

- store, objects, cards: repositories on disk, as git and git-LFS name things, and their cards
- faults: rules that make chosen requests fail, break off, crawl or lie
- request, reply: one HTTP request from end to end
- repositories, files, storage, commits, references, xet, administration: what it answers
- server: two sockets, the Hub and the storage that large files are redirected to

The real Hub redirects to its CDN. Storage wants a signed URL and refuses the user's token, so a
client that leaked its token there is found out. Large files travel by git-LFS (basic or multipart).
A 2.x client with `hf_xet` installed uploads by Xet without asking. So run it with
HF_HUB_DISABLE_XET=1, which `env()` sets, or start the server with xet=True, or with
upload_mode="regular", under which no file is large.
"""

from tests.hub_server.faults import Fault
from tests.hub_server.server import HubServer


__all__ = ["Fault", "HubServer"]
