# SPDX-License-Identifier: Apache-2.0
# gRPC without generated code: messages are bytes. rpc.py does the same, call for call.
#
# rpc.rb serve ADDRESS PORT
# rpc.rb ask ADDRESS PORT calls|retire|die SECONDS

require 'digest'
require 'grpc'
require 'json'

OPTIONS = { 'grpc.max_receive_message_length' => -1, 'grpc.max_send_message_length' => -1 }.freeze
SIZES = [0, 1, 17, 300, 4096, 16_384, 70_000].freeze
LARGE = 4 << 20
WARM = 300
PATIENCE = 60
CODES = GRPC::Core::StatusCodes.constants.to_h { |name| [GRPC::Core::StatusCodes.const_get(name), name.to_s] }

# The same bytes in every language.
def make(size, seed)
  block = Array.new([size, 1 << 12].min) { |at| (seed * 31 + at * 7) & 255 }.pack('C*')
  (block * (size / [block.bytesize, 1].max + 1)).byteslice(0, size)
end

# A message is its bytes.
class Raw
  attr_reader :data

  def initialize(data = '')
    @data = data.b
  end

  def self.encode(message)
    message.data
  end

  def self.decode(data)
    new(data)
  end

  def ==(other)
    data == other.data
  end
end

# What can be called.
class Test
  include GRPC::GenericService
  self.marshal_class_method = :encode
  self.unmarshal_class_method = :decode
  self.service_name = 'splicer.Test'
  %i[Echo Fail Sleep Ended Retire Die].each { |name| rpc name, Raw, Raw }
  rpc :Collect, stream(Raw), Raw
  rpc :Produce, Raw, stream(Raw)
  rpc :Chat, stream(Raw), stream(Raw)
end

# The server's side.
class Service < Test
  def initialize(retire)
    @retire = retire
    @guard = Mutex.new
    @ended = 0
  end

  def echo(request, _call)
    request
  end

  def fail(_request, _call)
    raise GRPC::FailedPrecondition, 'as it was asked to'
  end

  def sleep(_request, call)
    Kernel.sleep 0.005 until call.deadline < Time.now
    Raw.new
  end

  def ended(_request, _call)
    Raw.new(@guard.synchronize { @ended }.to_s)
  end

  def retire(_request, _call)
    @retire << true
    Raw.new
  end

  def die(_request, _call)
    Process.kill(:KILL, Process.pid)
    Raw.new
  end

  def collect(call)
    found = Digest::SHA256.new
    call.each_remote_read { |each| found << each.data }
    Raw.new(found.hexdigest)
  end

  def produce(request, _call)
    count, size = request.data.split.map(&:to_i)
    Enumerator.new do |out|
      (count.zero? ? (0..) : (0...count)).each { |number| out << Raw.new(make(size, number)) }
    ensure
      @guard.synchronize { @ended += 1 } if count.zero?
    end
  end

  def chat(requests, _call)
    requests
  end
end

def serve(target)
  retire = Queue.new
  server = GRPC::RpcServer.new(pool_size: 30, pool_keep_alive: PATIENCE, poll_period: PATIENCE,
                               server_args: { 'grpc.so_reuseport' => 0, **OPTIONS })
  server.add_http2_port(target, :this_port_is_insecure)
  server.handle(Service.new(retire))
  running = Thread.new { server.run }
  retire.pop
  server.stop
  running.join
end

# The client's side.
class Client
  attr_reader :facts

  def initialize(target)
    @target = target
    @stub = Test.rpc_stub_class.new(target, :this_channel_is_insecure, channel_args: OPTIONS)
    @facts = {}
  end

  def call(method, data = '', timeout = PATIENCE)
    @stub.public_send(method, Raw.new(data), deadline: Time.now + timeout).data
  end

  def name_error(method, timeout = PATIENCE)
    call(method, '', timeout)
    'OK'
  rescue GRPC::BadStatus => e
    CODES[e.code]
  end

  def warm_up
    # The first one waits for the server; there is no other way to say so here.
    call(:echo)
    WARM.times { |number| abort 'an answer is wrong' if call(:echo, make(64, number)) != make(64, number) }
  end

  def measure(seconds)
    start = Process.clock_gettime(Process::CLOCK_MONOTONIC)
    count = 0
    while (passed = Process.clock_gettime(Process::CLOCK_MONOTONIC) - start) < seconds
      call(:echo, '?')
      count += 1
    end
    (count / passed).round
  end

  # A call that goes on until nil is put into the queue: its answers, and the queue.
  def chat
    questions = Queue.new
    requests = Enumerator.new do |out|
      while (message = questions.pop)
        out << message
      end
    end
    [@stub.chat(requests, deadline: Time.now + PATIENCE), questions]
  end

  def talk(answers, questions, rounds)
    (0...rounds).count do |number|
      message = make(SIZES[number % SIZES.size], number)
      questions << Raw.new(message)
      answers.next.data == message
    end
  end

  def ask_unary
    @facts['unary'] = (0...200).count do |n|
      call(:echo, make(SIZES[n % SIZES.size], n)) == make(SIZES[n % SIZES.size], n)
    end
    @facts['large'] = (0...6).count { |n| call(:echo, make(LARGE, n)) == make(LARGE, n) }
  end

  def ask_in_parallel
    found = Array.new(8) do |thread|
      Thread.new do
        (0...50).count do |n|
          message = make(SIZES[(thread + n) % SIZES.size], n)
          call(:echo, message) == message
        end
      end
    end
    @facts['parallel'] = found.sum(&:value)
  end

  def stream
    [['small', 400, 100], ['medium', 200, 10_000], ['huge', 6, LARGE]].each do |name, count, size|
      sent = Array.new(count) { |number| make(size, number) }
      right = @stub.collect(sent.lazy.map { |each| Raw.new(each) }).data == Digest::SHA256.hexdigest(sent.join)
      got = @stub.produce(Raw.new("#{count} #{size}")).map(&:data)
      @facts["streams-#{name}"] = [right, got == sent]
    end
    answers, questions = chat
    @facts['chat'] = talk(answers, questions, 200)
    questions << nil
    @facts['chat-ended'] = end_of(answers)
  end

  def end_of(answers)
    answers.next
    'more'
  rescue StopIteration
    'OK'
  rescue GRPC::BadStatus => e
    CODES[e.code]
  end

  def cancel
    @facts['cancelled'] = Array.new(10) do |number|
      operation = @stub.produce(Raw.new('0 5000'), return_op: true)
      at = -1
      right = true
      code = 'OK'
      begin
        operation.execute.each do |each|
          right &&= each.data == make(5000, at += 1)
          operation.cancel if at == number
          break if at > number + 1000
        end
      rescue GRPC::BadStatus => e
        code = CODES[e.code]
      end
      [right, code]
    end
    deadline = Time.now + PATIENCE
    Kernel.sleep 0.01 until call(:ended) == '10' || Time.now > deadline
    @facts['ended'] = call(:ended)
    @facts['overdue'] = Array.new(5) { name_error(:sleep, 0.05) }
    @facts['failed'] = Array.new(5) { name_error(:fail) }
  end

  def outlive(last)
    answers, questions = chat
    @facts['before'] = talk(answers, questions, 100)
    if last == 'retire'
      call(:retire)
      deadline = Time.now + PATIENCE
      code = 'OK'
      # One that comes as the server stops may be cancelled.
      while %w[OK CANCELLED].include?(code = name_error(:echo)) && Time.now < deadline
        Kernel.sleep 0.01
      end
      @facts['refused'] = code
      @facts['after'] = talk(answers, questions, 200)
      questions << nil
    else
      @facts['died'] = name_error(:die)
    end
    @facts['ended'] = end_of(answers)
    questions << nil
  end
end

def ask(target, what, seconds)
  client = Client.new(target)
  client.warm_up
  measures = {}
  if what == 'calls'
    measures['calls per second'] = client.measure(seconds)
    client.ask_unary
    client.ask_in_parallel
    client.stream
    client.cancel
  else
    client.outlive(what)
  end
  puts JSON.generate({ facts: client.facts, measures: measures })
  $stdout.flush
end

target = "#{ARGV[1]}:#{ARGV[2]}"
ARGV[0] == 'serve' ? serve(target) : ask(target, ARGV[3], ARGV[4].to_f)
