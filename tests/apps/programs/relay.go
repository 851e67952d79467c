// SPDX-License-Identifier: Apache-2.0

// An echo server, a relay that copies with splice(2), and a client that checks what comes back.
//
//	relay serve ADDRESS:PORT
//	relay pass ADDRESS:PORT TARGET:PORT
//	relay ask ADDRESS:PORT CONNECTIONS MESSAGES BULK_BYTES
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/rand"
	"net"
	"os"
	"strconv"
)

const piece = 100000

var sizes = []int{1, 17, 300, 4096, 70000}

type answer struct {
	Same bool   `json:"same"`
	Sum  string `json:"sum"`
}

// io.Copy between two TCP connections is splice(2); hiding the type makes it read and write.
type hidden struct{ io.Reader }

func echo(conn *net.TCPConn) {
	defer conn.Close()
	if _, err := io.Copy(conn, hidden{conn}); err != nil {
		log.Print(err)
	}
}

func pass(client *net.TCPConn, target string) {
	defer client.Close()
	dialled, err := net.Dial("tcp", target)
	if err != nil {
		log.Print(err)
		return
	}
	server := dialled.(*net.TCPConn)
	defer server.Close()
	done := make(chan bool)
	go func() {
		io.Copy(server, client)
		server.CloseWrite()
		done <- true
	}()
	io.Copy(client, server)
	client.CloseWrite()
	<-done
}

func listen(address string, handle func(*net.TCPConn)) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		log.Fatal(err)
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go handle(conn.(*net.TCPConn))
	}
}

func ask(address string, number, messages, bulk int) (answer, error) {
	dialled, err := net.Dial("tcp", address)
	if err != nil {
		return answer{}, err
	}
	conn := dialled.(*net.TCPConn)
	defer conn.Close()
	random := rand.New(rand.NewSource(int64(number)))
	for message := 0; message < messages; message++ {
		data := make([]byte, sizes[message%len(sizes)])
		random.Read(data)
		half := 0
		if message%3 == 0 {
			half = len(data) / 2
		}
		for _, part := range [][]byte{data[:half], data[half:]} {
			if _, err := conn.Write(part); err != nil {
				return answer{}, err
			}
		}
		back := make([]byte, len(data))
		if _, err := io.ReadFull(conn, back); err != nil {
			return answer{}, fmt.Errorf("message %d: %w", message, err)
		}
		if !bytes.Equal(back, data) {
			return answer{}, fmt.Errorf("message %d came back changed", message)
		}
	}
	sent, received := sha256.New(), sha256.New()
	failed := make(chan error, 1)
	go func() {
		data := make([]byte, piece)
		for done := 0; done < bulk; done += piece {
			random.Read(data)
			sent.Write(data)
			if _, err := conn.Write(data); err != nil {
				failed <- err
				return
			}
		}
		failed <- conn.CloseWrite()
	}()
	if _, err := io.Copy(received, conn); err != nil {
		return answer{}, err
	}
	if err := <-failed; err != nil {
		return answer{}, err
	}
	sum := received.Sum(nil)
	return answer{bytes.Equal(sum, sent.Sum(nil)), fmt.Sprintf("%x", sum)}, nil
}

func askAll(address string, connections, messages, bulk int) {
	answers := make([]answer, connections)
	errors := make(chan error)
	for number := range answers {
		go func(number int) {
			var err error
			answers[number], err = ask(address, number, messages, bulk)
			errors <- err
		}(number)
	}
	for range answers {
		if err := <-errors; err != nil {
			log.Fatal(err)
		}
	}
	json.NewEncoder(os.Stdout).Encode(map[string][]answer{"answers": answers})
}

func main() {
	switch os.Args[1] {
	case "serve":
		listen(os.Args[2], echo)
	case "pass":
		listen(os.Args[2], func(conn *net.TCPConn) { pass(conn, os.Args[3]) })
	default:
		var numbers [3]int
		for index := range numbers {
			numbers[index], _ = strconv.Atoi(os.Args[3+index])
		}
		askAll(os.Args[2], numbers[0], numbers[1], numbers[2])
	}
}
