"""Files of package indexes, served by this process."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

import pytest

from psa_jax.config import RunError
from psa_jax.data.sources import fetch, package_index

CONTENT = b'an archive'
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = 'Some_Set-1.0.tar.gz'
LOGIN = 'Basic ' + base64.b64encode(b'me:p@ss').decode()


class Index(http.server.BaseHTTPRequestHandler):
  """An index in JSON that wants a login; its files lie elsewhere."""

  def do_GET(self):
    self.server.logins.append(self.headers['Authorization'])
    content = CONTENT
    if self.path == '/simple/some-set/':
      if self.headers['Authorization'] != LOGIN:
        self.send_error(401)
        return
      entries = [{'url': f'/files/x{FILE}'}, {'url': f'/files/{FILE}#md5=1'}]
      content = json.dumps({'files': entries}).encode()
    elif self.path == f'/files/{FILE}':
      self.send_response(302)
      port = self.server.server_address[1]
      self.send_header('Location', f'http://localhost:{port}/elsewhere')
      self.end_headers()
      return
    self.send_response(200)
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *_):
    pass


@contextlib.contextmanager
def served():
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Index) as server:
    server.logins = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
      yield server
    finally:
      server.shutdown()


@pytest.fixture
def pip(monkeypatch):
  """Answers of pip, by its last word."""
  answers = {'list': ''}
  monkeypatch.setattr(
    fetch, 'run', lambda name, command: answers[command[-1]].encode()
  )
  monkeypatch.setenv('no_proxy', '*')
  return answers


def download(folder, sha256=SHA256):
  package_index.download('set', 'Some.Set', FILE, sha256=sha256, folder=folder)
  return (folder / FILE).read_bytes()


def test_a_login_is_for_the_index_alone(tmp_path, pip):
  with served() as server:
    port = server.server_address[1]
    login = f'me:{urllib.parse.quote("p@ss")}@'
    pip['list'] = (
      f":env:.index-url='http://{login}127.0.0.1:{port}/simple/'\n"
      "global.index-url='http://127.0.0.1:9'\n"
    )
    assert download(tmp_path) == CONTENT
  assert server.logins == [LOGIN, LOGIN, None]


def write_index(folder, content=CONTENT, project='some-set'):
  page = folder / project / 'index.html'
  page.parent.mkdir(parents=True)
  page.write_text(f'<A HREF="../f/{FILE}#sha256={SHA256}">{FILE}</a><a>')
  (folder / 'f').mkdir()
  (folder / 'f' / FILE).write_bytes(content)
  return folder.as_uri()


def test_every_index_is_asked_and_the_hash_decides(tmp_path, pip):
  other = write_index(tmp_path / 'other', b'another archive')
  without = write_index(tmp_path / 'without', project='else')
  good = write_index(tmp_path / 'good')
  pip['list'] = (
    f"global.index-url='{without}'\nglobal.extra-index-url='{other} {good}'"
  )
  assert download(tmp_path) == CONTENT
  (tmp_path / FILE).unlink()
  pip['list'] = pip['list'].replace(f' {good}', '')
  with pytest.raises(RunError, match='^set could not be fetched: .*; .*sha256'):
    download(tmp_path)
  assert not (tmp_path / FILE).exists()


def test_without_a_setting_it_is_the_index_of_pip(tmp_path, monkeypatch):
  """Which this pip still says; nothing is asked there."""
  monkeypatch.setattr(package_index, '_settings', lambda name: {})
  (index,) = package_index._indexes('set', {})
  assert index.startswith('https://') and index.endswith('/simple')
  monkeypatch.setattr(fetch, 'run', lambda name, command: b'')
  with pytest.raises(RunError, match='pip names no index; set its index-url'):
    download(tmp_path)


def test_what_is_too_long_is_not_kept(tmp_path, pip, monkeypatch):
  monkeypatch.setattr(package_index, 'MOST_BYTES', 8)
  pip['list'] = f"global.index-url='{write_index(tmp_path / 'i')}'"
  with pytest.raises(RunError, match='sent more than 8 bytes'):
    download(tmp_path)
