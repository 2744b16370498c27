"""As much of the Hugging Face hub as pushing and loading a model asks for, on this machine."""

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse


class FakeHub:
  """Models in memory behind the hub's HTTP interface.

  Attributes:
    files: name -> commit -> path -> content. heads: name -> branch -> commit.
    asked: method and path of every request, in order.
  """

  def __init__(self):
    self.files, self.heads, self.asked = {}, {}, []
    hub = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = 'HTTP/1.1'

      def do_GET(self):
        hub.handle(self, b'')

      do_HEAD = do_GET

      def do_POST(self):
        if 'chunked' in self.headers.get('Transfer-Encoding', ''):
          body = b''
          while size := int(self.rfile.readline().strip() or b'0', 16):
            body += self.rfile.read(size)
            self.rfile.readline()
          self.rfile.readline()
        else:
          body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        hub.handle(self, body)

      def log_message(self, *_):
        pass

    self.server = http.server.ThreadingHTTPServer(('localhost', 0), Handler)
    self.address = f'http://localhost:{self.server.server_address[1]}'
    self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
    self.thread.start()

  def close(self):
    self.server.shutdown()
    self.server.server_close()
    self.thread.join()

  def handle(self, request, body):
    """One request."""
    path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
    self.asked.append(f'{request.command} {path}')
    parts = path.strip('/').split('/')
    writes = request.command == 'POST' and parts[:1] == ['api'] and 'validate-yaml' not in path
    if writes and request.headers.get('Authorization') != 'Bearer right':
      return self.reply(request, 401, {'error': 'Invalid username or password.'})
    if path == '/api/repos/create':
      asked = json.loads(body)
      name = '/'.join(filter(None, (asked.get('organization'), asked['name'])))
      self.files.setdefault(name, {})
      self.heads.setdefault(name, {})
      return self.reply(request, 200, {'url': f'{self.address}/{name}', 'id': name, 'name': name})
    if path == '/api/validate-yaml':
      return self.reply(request, 200, {'errors': [], 'warnings': []})
    if parts[:2] == ['api', 'models']:
      return self.model(request, '/'.join(parts[2:4]), parts[4:], body)
    if len(parts) > 4 and parts[2] == 'resolve':
      return self.file(request, '/'.join(parts[:2]), parts[3], '/'.join(parts[4:]))
    return self.reply(request, 404, {'error': 'not here'})

  def commit(self, name, revision):
    """The commit of a revision, None where there is none."""
    return revision if revision in self.files.get(name, {}) else \
      self.heads.get(name, {}).get(revision)

  def model(self, request, name, rest, body):
    """/api/models/NAME/..."""
    if name not in self.files:
      return self.reply(request, 404, {'error': 'Repository not found'},
                        {'X-Error-Code': 'RepoNotFound'})
    what, revision = (rest[0], rest[1]) if len(rest) > 1 else ('revision', 'main')
    if what == 'preupload':
      files = [{'path': file['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
               for file in json.loads(body)['files']]
      return self.reply(request, 200, {'files': files})
    if what == 'commit':
      lines = [json.loads(line) for line in body.splitlines() if line.strip()]
      before = self.files[name].get(self.heads[name].get(revision), {})
      after = before | {line['value']['path']: base64.b64decode(line['value']['content'])
                        for line in lines if line['key'] == 'file'}
      oid = hashlib.sha1(repr(sorted(after.items())).encode()).hexdigest()
      self.files[name][oid], self.heads[name][revision] = after, oid
      return self.reply(request, 200, {'success': True, 'commitOid': oid, 'hookOutput': '',
                                       'commitUrl': f'{self.address}/{name}/commit/{oid}'})
    commit = self.commit(name, revision)
    if commit is None and self.heads[name]:
      return self.reply(request, 404, {'error': 'Revision not found'},
                        {'X-Error-Code': 'RevisionNotFound'})
    files = self.files[name].get(commit, {})
    if what == 'tree':
      return self.reply(request, 200, [
        {'type': 'file', 'path': path, 'size': len(data), 'oid': hashlib.sha1(data).hexdigest()}
        for path, data in sorted(files.items())])
    return self.reply(request, 200, {
      'id': name, 'modelId': name, 'sha': commit, 'private': False, 'tags': [], 'downloads': 0,
      'likes': 0, 'siblings': [{'rfilename': path} for path in sorted(files)]})

  def file(self, request, name, revision, path):
    """The content of a file, or its head."""
    commit = self.commit(name, revision)
    data = self.files.get(name, {}).get(commit, {}).get(path)
    if data is None:
      return self.reply(request, 404, {'error': 'Entry not found'},
                        {'X-Error-Code': 'EntryNotFound'})
    return self.send(request, 200, data, {
      'ETag': f'"{hashlib.sha1(data).hexdigest()}"', 'X-Repo-Commit': commit})

  def reply(self, request, status, value, headers=None):
    """JSON."""
    self.send(request, status, json.dumps(value).encode(),
              {'Content-Type': 'application/json', **(headers or {})})

  @staticmethod
  def send(request, status, data, headers):
    """Bytes; of a HEAD only how many."""
    request.send_response(status)
    for key, value in {**headers, 'Content-Length': str(len(data))}.items():
      request.send_header(key, value)
    request.end_headers()
    if request.command != 'HEAD':
      request.wfile.write(data)
