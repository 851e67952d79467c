// SPDX-License-Identifier: Apache-2.0

import java.io.EOFException;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Iterator;
import java.util.List;
import java.util.Random;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;

/**
 * An echo server, and a client that checks what comes back.
 *
 * <pre>
 * java Echo serve STYLE ADDRESS PORT
 * java Echo ask STYLE ADDRESS PORT CONNECTIONS MESSAGES BULK_BYTES
 * </pre>
 *
 * STYLE is how sockets are read: `stream`, blocking reads; `available`, reads with a time limit, which makes
 * Java's sockets non-blocking, of exactly as many bytes as available() says there are; `channel`, a selector.
 */
public class Echo {
    static final int[] SIZES = {1, 17, 300, 4096, 70000};
    static final int PIECE = 100_000;
    static final int TIMEOUT_MS = 20_000;

    public static void main(String[] arguments) throws Exception {
        String style = arguments[1];
        InetAddress address = InetAddress.getByName(arguments[2]);
        int port = Integer.parseInt(arguments[3]);
        if (arguments[0].equals("serve")) {
            if (style.equals("channel")) {
                serveChannels(new InetSocketAddress(address, port));
            } else {
                serve(style, address, port);
            }
            return;
        }
        int connections = Integer.parseInt(arguments[4]);
        int messages = Integer.parseInt(arguments[5]);
        int bulk = Integer.parseInt(arguments[6]);
        ExecutorService threads = Executors.newCachedThreadPool();
        List<Future<String>> asked = new ArrayList<>();
        for (int number = 0; number < connections; number++) {
            int own = number;
            Callable<String> work = () -> ask(style, address, port, own, messages, bulk);
            asked.add(threads.submit(work));
        }
        List<String> answers = new ArrayList<>();
        for (Future<String> each : asked) {
            answers.add(each.get());
        }
        System.out.println("{\"answers\": [" + String.join(", ", answers) + "]}");
        threads.shutdownNow();
    }

    // -- servers -----------------------------------------------------------------------------------

    static void serve(String style, InetAddress address, int port) throws IOException {
        try (ServerSocket listener = new ServerSocket(port, 50, address)) {
            while (true) {
                Socket socket = listener.accept();
                new Thread(() -> echo(style, socket)).start();
            }
        }
    }

    static void echo(String style, Socket accepted) {
        try (Socket socket = accepted) {
            prepare(style, socket);
            byte[] buffer = new byte[65536];
            int count;
            while ((count = read(style, socket.getInputStream(), buffer, buffer.length)) > 0) {
                socket.getOutputStream().write(buffer, 0, count);
            }
        } catch (IOException error) {
            error.printStackTrace();
        }
    }

    static void serveChannels(InetSocketAddress address) throws IOException {
        Selector selector = Selector.open();
        ServerSocketChannel listener = ServerSocketChannel.open();
        listener.bind(address);
        listener.configureBlocking(false);
        listener.register(selector, SelectionKey.OP_ACCEPT);
        while (true) {
            selector.select();
            Iterator<SelectionKey> keys = selector.selectedKeys().iterator();
            while (keys.hasNext()) {
                SelectionKey key = keys.next();
                keys.remove();
                if (key.isAcceptable()) {
                    SocketChannel channel = listener.accept();
                    channel.configureBlocking(false);
                    channel.register(selector, SelectionKey.OP_READ, ByteBuffer.allocateDirect(65536));
                } else {
                    echo(key);
                }
            }
        }
    }

    /** Reads when the buffer is empty, writes until it is, as far as the socket lets it. */
    static void echo(SelectionKey key) throws IOException {
        SocketChannel channel = (SocketChannel) key.channel();
        ByteBuffer buffer = (ByteBuffer) key.attachment();
        if (key.isReadable()) {
            buffer.clear();
            if (channel.read(buffer) < 0) {
                channel.close();
                return;
            }
            buffer.flip();
        }
        channel.write(buffer);
        key.interestOps(buffer.hasRemaining() ? SelectionKey.OP_WRITE : SelectionKey.OP_READ);
    }

    // -- client ------------------------------------------------------------------------------------

    static String ask(String style, InetAddress address, int port, int number, int messages, int bulk)
            throws Exception {
        Random random = new Random(number);
        MessageDigest received = MessageDigest.getInstance("SHA-256");
        MessageDigest sent = MessageDigest.getInstance("SHA-256");
        try (Channel channel = open(style, address, port)) {
            for (int message = 0; message < messages; message++) {
                byte[] data = new byte[SIZES[message % SIZES.length]];
                random.nextBytes(data);
                int half = message % 3 == 0 ? data.length / 2 : 0;
                channel.write(Arrays.copyOfRange(data, 0, half));
                channel.write(Arrays.copyOfRange(data, half, data.length));
                byte[] back = new byte[data.length];
                int got = 0;
                while (got < back.length) {
                    byte[] piece = new byte[back.length - got];
                    int count = channel.read(piece);
                    if (count <= 0) {
                        throw new EOFException("in message " + message);
                    }
                    System.arraycopy(piece, 0, back, got, count);
                    got += count;
                }
                if (!Arrays.equals(data, back)) {
                    throw new IOException("message " + message + " came back changed");
                }
            }
            Thread writer = new Thread(() -> {
                try {
                    byte[] data = new byte[PIECE];
                    for (int done = 0; done < bulk; done += PIECE) {
                        random.nextBytes(data);
                        sent.update(data);
                        channel.write(data);
                    }
                    channel.finish();
                } catch (IOException error) {
                    error.printStackTrace();
                }
            });
            writer.start();
            byte[] buffer = new byte[65536];
            int count;
            while ((count = channel.read(buffer)) > 0) {
                received.update(buffer, 0, count);
            }
            writer.join();
        }
        String sum = hex(received.digest());
        return "{\"same\": " + sum.equals(hex(sent.digest())) + ", \"sum\": \"" + sum + "\"}";
    }

    static Channel open(String style, InetAddress address, int port) throws IOException {
        return style.equals("channel") ? new Selected(address, port) : new Streamed(style, address, port);
    }

    /** A connection; `read` fills part of the buffer and returns 0 or less at the end of the stream. */
    interface Channel extends AutoCloseable {
        int read(byte[] buffer) throws IOException;

        void write(byte[] data) throws IOException;

        void finish() throws IOException;

        @Override
        void close() throws IOException;
    }

    static class Streamed implements Channel {
        private final String style;
        private final Socket socket;

        Streamed(String style, InetAddress address, int port) throws IOException {
            this.style = style;
            socket = new Socket(address, port);
            prepare(style, socket);
        }

        @Override
        public int read(byte[] buffer) throws IOException {
            return Echo.read(style, socket.getInputStream(), buffer, buffer.length);
        }

        @Override
        public void write(byte[] data) throws IOException {
            if (data.length > 0) {
                socket.getOutputStream().write(data);
            }
        }

        @Override
        public void finish() throws IOException {
            socket.shutdownOutput();
        }

        @Override
        public void close() throws IOException {
            socket.close();
        }
    }

    /** Two selectors, since one thread reads while another writes. */
    static class Selected implements Channel {
        private final SocketChannel channel;
        private final Selector readable = Selector.open();
        private final Selector writable = Selector.open();

        Selected(InetAddress address, int port) throws IOException {
            channel = SocketChannel.open(new InetSocketAddress(address, port));
            channel.configureBlocking(false);
            channel.register(readable, SelectionKey.OP_READ);
            channel.register(writable, SelectionKey.OP_WRITE);
        }

        @Override
        public int read(byte[] buffer) throws IOException {
            ByteBuffer into = ByteBuffer.wrap(buffer);
            int count;
            while ((count = channel.read(into)) == 0) {
                readable.select(TIMEOUT_MS);
                readable.selectedKeys().clear();
            }
            return count;
        }

        @Override
        public void write(byte[] data) throws IOException {
            ByteBuffer from = ByteBuffer.wrap(data);
            while (from.hasRemaining()) {
                if (channel.write(from) == 0) {
                    writable.select(TIMEOUT_MS);
                    writable.selectedKeys().clear();
                }
            }
        }

        @Override
        public void finish() throws IOException {
            channel.shutdownOutput();
        }

        @Override
        public void close() throws IOException {
            channel.close();
            readable.close();
            writable.close();
        }
    }

    // ----------------------------------------------------------------------------------------------

    static void prepare(String style, Socket socket) throws IOException {
        socket.setTcpNoDelay(true);
        if (style.equals("available")) {
            socket.setSoTimeout(TIMEOUT_MS);
        }
    }

    /** In style `available`: one byte, which is what is waited for, and then what available() promises. */
    static int read(String style, InputStream in, byte[] buffer, int most) throws IOException {
        if (!style.equals("available")) {
            return in.read(buffer, 0, most);
        }
        int first = in.read();
        if (first < 0) {
            return -1;
        }
        buffer[0] = (byte) first;
        int promised = Math.min(in.available(), most - 1);
        int got = 0;
        while (got < promised) {
            int count = in.read(buffer, 1 + got, promised - got);
            if (count <= 0) {
                throw new EOFException("available() promised " + promised + " and there were " + got);
            }
            got += count;
        }
        return 1 + got;
    }

    static String hex(byte[] bytes) {
        StringBuilder text = new StringBuilder();
        for (byte each : bytes) {
            text.append(String.format("%02x", each));
        }
        return text.toString();
    }
}
