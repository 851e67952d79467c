// SPDX-License-Identifier: Apache-2.0
//
// node echo.js serve ADDRESS PORT
// node echo.js ask ADDRESS PORT CONNECTIONS MESSAGES BULK_BYTES
//
// An echo server, and a client that checks what comes back: messages one at a time, then much at once
// with the end of the stream behind it.
'use strict';
const crypto = require('crypto');
const net = require('net');

const SIZES = [1, 17, 300, 4096, 70000];

function serve(address, port) {
  const server = net.createServer({ allowHalfOpen: true }, (socket) => socket.pipe(socket));
  server.listen(port, address);
}

// Bytes that depend on the connection and the message only.
function make(connection, message, size) {
  const seed = Buffer.from(`${connection}/${message}`);
  return crypto.createCipheriv('aes-128-ctr', crypto.createHash('md5').update(seed).digest(), Buffer.alloc(16))
    .update(Buffer.alloc(size));
}

function ask(address, port, connection, messages, bulk) {
  return new Promise((resolve, reject) => {
    const socket = net.connect({ host: address, port, allowHalfOpen: true });
    const sent = crypto.createHash('sha256');
    const received = crypto.createHash('sha256');
    let message = 0;
    let wanted = null;
    let got = 0;

    function next() {
      if (message === messages) {
        wanted = null;
        flood(0);
        return;
      }
      wanted = make(connection, message, SIZES[message % SIZES.length]);
      got = 0;
      message += 1;
      const half = message % 3 === 0 ? wanted.length >> 1 : 0;
      if (half > 0) {
        socket.write(wanted.subarray(0, half), () => socket.write(wanted.subarray(half)));
      } else {
        socket.write(wanted);
      }
    }

    function flood(done) {
      while (done < bulk) {
        const data = make(connection, -done - 1, 100000);
        sent.update(data);
        done += data.length;
        if (!socket.write(data) && done < bulk) {
          socket.once('drain', () => flood(done));
          return;
        }
      }
      socket.end();
    }

    socket.on('connect', next);
    socket.on('error', reject);
    socket.on('data', (data) => {
      if (wanted === null) {
        received.update(data);
        return;
      }
      if (data.compare(wanted, got, got + data.length) !== 0 || got + data.length > wanted.length) {
        reject(new Error(`message ${message} came back changed`));
        return;
      }
      got += data.length;
      if (got === wanted.length) {
        next();
      }
    });
    socket.on('end', () => {
      const sum = received.digest('hex');
      resolve({ same: sum === sent.digest('hex'), sum });
    });
  });
}

const [, , role, address, port, ...numbers] = process.argv;
if (role === 'serve') {
  serve(address, Number(port));
} else {
  const [connections, messages, bulk] = numbers.map(Number);
  const asked = Array.from({ length: connections }, (_, n) => ask(address, Number(port), n, messages, bulk));
  Promise.all(asked).then(
    (answers) => console.log(JSON.stringify({ answers })),
    (error) => { console.error(error.message); process.exit(1); },
  );
}
