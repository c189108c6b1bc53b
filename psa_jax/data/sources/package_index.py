"""A file of the package index, by its hash; nothing in it is run.

pip prepares a source archive that it downloads, which runs the package's own
code. So pip is only asked where its index is, and with which certificates; the
file itself is downloaded here, and what does not have the hash is not kept.

Of pip's settings these count: `index-url`, `extra-index-url`, `cert` and
`proxy`, from its files and variables.
"""

import ast
import base64
import hashlib
import html.parser
import http.client
import json
import re
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from psa_jax.config import RunError
from psa_jax.data.sources import fetch

MOST_BYTES = 2**26  # of a file or a page
_SECONDS = 60.0  # without an answer
_JSON = 'application/vnd.pypi.simple.v1+json'
_PIPS_OWN = (
  'from pip._internal.models.index import PyPI; print(PyPI.simple_url)'
)
_PIP = (sys.executable, '-m', 'pip', '--disable-pip-version-check')


def download(
  name: str, project: str, file: str, *, sha256: str, folder: Path
) -> None:
  """Writes a file of a project into a folder.

  Args:
    name: of the data set, for messages.
    project: in the index.
    file: its name there, and in the folder.
    sha256: of its content.
    folder: where it is written to.

  Raises:
    RunError: no index has it, or another file of that name.
  """
  settings = _settings(name)
  opener = _opener(settings)
  reasons = []
  for index in _indexes(name, settings):
    try:
      content = _read(opener, _link(opener, index, project, file))
    except (OSError, ValueError, http.client.HTTPException) as e:
      reasons.append(str(e))
      continue
    found = hashlib.sha256(content).hexdigest()
    if found == sha256:
      (folder / file).write_bytes(content)
      return
    reasons.append(f'{file} has sha256 {found} and not {sha256}')
  reason = '; '.join(reasons) or 'pip names no index; set its index-url'
  raise RunError(f'{name} could not be fetched: {reason[-500:]}')


def _settings(name: str) -> dict[str, str]:
  """Options of `pip download`; variables count before files."""
  lines = fetch.run(name, [*_PIP, 'config', 'list']).decode().split('\n')
  pairs = [line.partition('=') for line in lines if '=' in line]
  values = {key: str(ast.literal_eval(text)) for key, _, text in pairs}
  settings = {}
  for option in ('index-url', 'extra-index-url', 'cert', 'proxy'):
    for section in (':env:', 'download', 'global'):
      if value := values.get(f'{section}.{option}'):
        settings.setdefault(option, value)
  return settings


def _indexes(name: str, settings: dict[str, str]) -> list[str]:
  index = settings.get('index-url')
  if index is None:
    index = fetch.run(name, [sys.executable, '-c', _PIPS_OWN]).decode()
  return [*index.split(), *settings.get('extra-index-url', '').split()]


def _opener(settings: dict[str, str]) -> urllib.request.OpenerDirector:
  context = ssl.create_default_context(cafile=settings.get('cert'))
  handlers: list[Any] = [urllib.request.HTTPSHandler(context=context)]
  if proxy := settings.get('proxy'):
    handlers.append(
      urllib.request.ProxyHandler({'http': proxy, 'https': proxy})
    )
  return urllib.request.build_opener(*handlers)


def _link(opener, index: str, project: str, file: str) -> str:
  """Address of a file, from the page of its project.

  Raises:
    ValueError: it is not there.
  """
  page = f'{index.rstrip("/")}/{re.sub(r"[-_.]+", "-", project).lower()}/'
  if page.startswith('file:'):
    page += 'index.html'
  content = _read(opener, page).decode('utf-8', 'replace')
  for link in _links(content):
    address = urllib.parse.urljoin(page, link)
    path = urllib.parse.unquote(urllib.parse.urlsplit(address).path)
    if path.rpartition('/')[2] == file:
      return urllib.parse.urldefrag(address).url
  raise ValueError(f'the index has no {file}')


def _links(content: str) -> Iterator[str]:
  """Of a page, in JSON (PEP 691) or HTML (PEP 503)."""
  if content.lstrip().startswith('{'):
    yield from (str(entry['url']) for entry in json.loads(content)['files'])
    return
  found = []

  class Anchors(html.parser.HTMLParser):
    """Collects the targets of links."""

    def handle_starttag(self, tag, attrs):
      found.extend(value for key, value in attrs if (tag, key) == ('a', 'href'))

  Anchors().feed(content)
  yield from filter(None, found)


def _read(opener, address: str) -> bytes:
  """Content of an address, which may carry a user and a password."""
  parts = urllib.parse.urlsplit(address)
  user, at, host = parts.netloc.rpartition('@')
  request = urllib.request.Request(
    parts._replace(netloc=host).geturl(),
    headers={'Accept': f'{_JSON}, text/html;q=0.5, */*;q=0.1'},
  )
  if at:
    token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    # Not handed on to where the index sends us.
    request.add_unredirected_header('Authorization', f'Basic {token}')
  with opener.open(request, timeout=_SECONDS) as response:
    content = response.read(MOST_BYTES + 1)
  if len(content) > MOST_BYTES:
    raise ValueError(f'{host or "a file"} sent more than {MOST_BYTES:,} bytes')
  return content
