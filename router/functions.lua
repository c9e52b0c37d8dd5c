#!lua name=seamount_1
-- Every transition of a session, each one atomic step.
--
-- Keys of a session share the hash tag {tenant/session}, so that one function may touch all four:
--   KEYS[1] meta   hash: what is said once (record, created), where the session stands (rest, head, epoch, chain,
--                  summary …) and the running turn (turn, key, hash, owner, nonce, deadline; turn = '' for none)
--   KEYS[2] turns  list: one entry a committed turn: 32 bytes of chain, then the TurnRecord
--   KEYS[3] keys   hash: idempotency key -> outcome (packed), of turns that ended for good and of updates
--   KEYS[4] log    stream, one a turn: its start, its tokens, its end. It expires some time after the turn's end.
--
-- Entries of a log have one field: 'start' (TurnStart) under the id 0-1, 'tokens' (LoggedTokens: of the prompt their
-- number, under 0-2, then what is sampled, under n-0 with n tokens up to the entry's last), and 'ended' (TurnEvent) or
-- 'committed' (index of its entry in turns) last. A writer names the id before its own: a repeated append is recognised,
-- a gap refused.
--
-- Rules. A function checks everything first and writes last: an error raised by Lua keeps the writes made before it.
-- Times are the server's own. Numbers are stored in decimal; 2^53 is never reached. Bytes are opaque here. An answer
-- is a list whose first element is a constant name; an error reply is a defect or a damaged key (WRONGTYPE).
-- Functions marked allow-oom only end what was begun or make room: under maxmemory new work is refused up front,
-- turns already computed are still committed.
-- The library's name carries its version, and so do the functions': two versions may be loaded side by side.

local VIEW = {'record', 'rest', 'head', 'epoch', 'chain', 'summary', 'rank', 'prompt_tokens', 'output_tokens',
              'updated', 'turn', 'key', 'owner', 'deadline'}
local HIDDEN = {'tenant', 'session', 'created', 'num_keys', 'hash', 'nonce', 'create_hash'}

local function decimal(number)
  return string.format('%.0f', number)
end

local function now_us()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

local function now_ms()
  return math.floor(now_us() / 1000)
end

-- The session's fields by name, or nil and the answer that says why not.
local function load(keys, tenant, session)
  local names = {}
  for _, name in ipairs(VIEW) do names[#names + 1] = name end
  for _, name in ipairs(HIDDEN) do names[#names + 1] = name end
  local values = redis.call('HMGET', keys[1], unpack(names))
  local meta, present = {}, 0
  for i, name in ipairs(names) do
    if values[i] then
      meta[name], present = values[i], present + 1
    end
  end
  if present == 0 then
    if redis.call('EXISTS', keys[2], keys[3]) > 0 then return nil, {'DATA_LOSS', 'meta'} end
    return nil, {'NOT_FOUND'}
  end
  if present < #names then return nil, {'DATA_LOSS', 'meta'} end
  meta.lease = redis.call('HGET', keys[1], 'lease') or '' -- there since one was asked for
  meta.options = redis.call('HGET', keys[1], 'options') or ''
  if meta.tenant ~= tenant or meta.session ~= session then return nil, {'DATA_LOSS', 'identity'} end
  for _, name in ipairs({'head', 'epoch', 'num_keys', 'deadline', 'prompt_tokens', 'output_tokens'}) do
    local number = tonumber(meta[name])
    if not number then return nil, {'DATA_LOSS', name} end
    meta[name] = number
  end
  if redis.call('LLEN', keys[2]) ~= meta.head then return nil, {'DATA_LOSS', 'turns'} end
  if redis.call('HLEN', keys[3]) ~= meta.num_keys then return nil, {'DATA_LOSS', 'keys'} end
  return meta, nil
end

local function view(meta)
  local values = {}
  for i, name in ipairs(VIEW) do
    local value = meta[name]
    if type(value) == 'number' then value = decimal(value) end
    values[i] = value
  end
  values[#VIEW + 1], values[#VIEW + 2] = meta.lease, meta.options
  return values
end

-- The entries after `known_head`, and the index of the first: all of them where the caller knows more than there is.
local function entries_after(keys, meta, known_head)
  local first = known_head
  if first > meta.head then first = 0 end
  if first == meta.head then return first, {} end
  return first, redis.call('LRANGE', keys[2], first, -1)
end

local function outcome_of(keys, key)
  local packed = redis.call('HGET', keys[3], key)
  return packed and cmsgpack.unpack(packed) or nil
end

-- Clears the running turn's fields and sets those given.
local function write_meta(keys, fields)
  redis.call('HSET', keys[1], 'turn', '', 'key', '', 'hash', '', 'owner', '', 'nonce', '', 'deadline', '0',
             'updated', decimal(now_ms()), unpack(fields))
end

-- Id, field and value of a log's last entry; nil for a log that is not there.
local function last_entry(log)
  local last = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  if not last then return nil end
  return last[1], last[2][1], last[2][2]
end

-- Writes the log's last entry, where there is a log, and lets it expire.
local function close_log(log, field, value, kept_ms)
  local id = last_entry(log)
  if not id then return end
  local num_tokens, place = string.match(id, '^(%d+)-(%d+)$')
  redis.call('XADD', log, num_tokens .. '-' .. decimal(tonumber(place) + 1), field, value)
  redis.call('PEXPIRE', log, kept_ms)
end

-- Its epochs count on from the time of creation in microseconds: a session that is made anew under the id of a deleted
-- one is above all epochs of that, which ranks may remember.
-- ARGV tenant, session, record, body hash, summary, chain, created (ms), rest, rank, options, then the entries it begins
--      with: those of another session, chained to its own record
--   {CREATED|EXISTS, created, view} · {KEY_REUSED} · {DATA_LOSS, part}
local function create_session(keys, argv)
  local tenant, session, record, body_hash, rest = argv[1], argv[2], argv[3], argv[4], argv[8]
  local meta, refusal = load(keys, tenant, session)
  if meta then
    if meta.create_hash ~= body_hash then return {'KEY_REUSED'} end
    return {'EXISTS', meta.created, view(meta)}
  end
  if refusal[1] ~= 'NOT_FOUND' then return refusal end
  if rest ~= 'idle' and rest ~= 'waiting_for_tools' then return redis.error_reply('ERR rest is ' .. rest) end
  for i = 11, #argv do redis.call('RPUSH', keys[2], argv[i]) end
  redis.call('HSET', keys[1], 'tenant', tenant, 'session', session, 'record', record, 'create_hash', body_hash,
             'summary', argv[5], 'chain', argv[6], 'created', argv[7], 'updated', decimal(now_ms()), 'rest', rest,
             'head', decimal(#argv - 10), 'epoch', decimal(now_us()), 'num_keys', '0', 'rank', argv[9], 'options', argv[10],
             'prompt_tokens', '0', 'output_tokens', '0', 'turn', '', 'key', '', 'hash', '', 'owner', '', 'nonce', '', 'deadline', '0')
  meta = load(keys, tenant, session)
  return {'CREATED', meta.created, view(meta)}
end

-- ARGV tenant, session, known head (-1: no entries wanted)
--   {OK, created, view, first, entries} · {NOT_FOUND} · {DATA_LOSS, part}
local function get_session(keys, argv)
  local known_head = tonumber(argv[3])
  local meta, refusal = load(keys, argv[1], argv[2])
  if not meta then return refusal end
  if known_head < 0 then return {'OK', meta.created, view(meta), meta.head, {}} end
  local first, entries = entries_after(keys, meta, known_head)
  return {'OK', meta.created, view(meta), first, entries}
end

-- Changes what may change after creation, between two turns. The key is remembered beside those of turns.
-- ARGV tenant, session, key, body hash, options
--   {UPDATED, view}, also for the same call again · {KEY_REUSED} · {IN_PROGRESS, ms until its deadline, turn} · {CLOSED}
--   {NOT_FOUND} · {DATA_LOSS, part}
local function update_session(keys, argv)
  local key, body_hash = argv[3], argv[4]
  local meta, refusal = load(keys, argv[1], argv[2])
  if not meta then return refusal end
  local outcome = outcome_of(keys, key)
  if outcome and outcome.hash == body_hash then return {'UPDATED', view(meta)} end
  if outcome or (meta.turn ~= '' and meta.key == key) then return {'KEY_REUSED'} end
  if meta.turn ~= '' then return {'IN_PROGRESS', decimal(math.max(0, meta.deadline - now_ms())), meta.turn} end
  if meta.rest ~= 'idle' and meta.rest ~= 'waiting_for_tools' then return {'CLOSED'} end

  redis.call('HSET', keys[3], key, cmsgpack.pack({status = 'updated', hash = body_hash}))
  redis.call('HSET', keys[1], 'options', argv[5], 'num_keys', decimal(meta.num_keys + 1), 'updated', decimal(now_ms()))
  return {'UPDATED', view(load(keys, argv[1], argv[2]))}
end

-- What an idempotency key says about a turn that ended: its record, with the chain before it, or its last event.
local function replay(keys, meta, outcome)
  if outcome.status ~= 'done' then return {'ENDED', view(meta), outcome.turn, outcome.event} end
  local entry = redis.call('LINDEX', keys[2], outcome.index)
  local before = ''
  if outcome.index > 0 then before = string.sub(redis.call('LINDEX', keys[2], outcome.index - 1), 1, 32) end
  return {'DONE', view(meta), outcome.turn, outcome.index, before, entry}
end

-- ARGV tenant, session, key, body hash, known head, expected head ('' = any), turn id, nonce, owner, time to live (ms),
--      grace (ms), start, how long a log is kept (ms).   KEYS[4]: the log of the turn id
--   {BEGUN, turn, view, first, entries} · {DONE, view, turn, index, chain before ('' = root), entry}
--   {ENDED, view, turn, event}
--   {RUNNING, view}: this key's turn runs · {IN_PROGRESS, ms until its deadline, turn}: another one does
--   {KEY_REUSED} · {HEAD_MOVED, head} · {CLOSED} · {NOT_FOUND} · {DATA_LOSS, part}
local function begin_turn(keys, argv)
  local key, body_hash, known_head, expected_head = argv[3], argv[4], tonumber(argv[5]), tonumber(argv[6])
  local turn, nonce, owner = argv[7], argv[8], argv[9]
  local now = now_ms()
  local deadline, grace = now + tonumber(argv[10]), tonumber(argv[11])
  local meta, refusal = load(keys, argv[1], argv[2])
  if not meta then return refusal end

  local same_key = meta.turn ~= '' and meta.key == key
  if same_key then
    if meta.hash ~= body_hash then return {'KEY_REUSED'} end
  else
    local outcome = outcome_of(keys, key)
    if outcome then
      if outcome.hash ~= body_hash then return {'KEY_REUSED'} end
      return replay(keys, meta, outcome)
    end
  end

  local first, entries = entries_after(keys, meta, known_head)
  if meta.turn ~= '' then
    if same_key and meta.nonce == nonce then -- this very call again: its first answer was lost
      return {'BEGUN', meta.turn, view(meta), first, entries}
    end
    if now <= meta.deadline + grace then
      if same_key then return {'RUNNING', view(meta)} end
      return {'IN_PROGRESS', decimal(math.max(0, meta.deadline + grace - now)), meta.turn}
    end
  end
  if expected_head and expected_head ~= meta.head then return {'HEAD_MOVED', decimal(meta.head)} end
  if meta.rest ~= 'idle' and meta.rest ~= 'waiting_for_tools' then return {'CLOSED'} end

  meta.turn, meta.key, meta.owner, meta.deadline, meta.epoch = turn, key, owner, deadline, meta.epoch + 1
  meta.updated = decimal(now)
  redis.call('DEL', keys[4])
  redis.call('XADD', keys[4], '0-1', 'start', argv[12])
  redis.call('PEXPIRE', keys[4], decimal(deadline - now + grace + tonumber(argv[13])))
  redis.call('HSET', keys[1], 'turn', turn, 'key', key, 'hash', body_hash, 'owner', owner, 'nonce', nonce,
             'deadline', decimal(deadline), 'epoch', decimal(meta.epoch), 'updated', meta.updated)
  return {'BEGUN', turn, view(meta), first, entries}
end

-- Takes a running turn from an owner that is judged dead: from now on everything of its epoch is refused.
-- ARGV tenant, session, known head, turn, the dead owner's epoch, new owner
--   {TAKEN, ms until its deadline (may be negative), view, first, entries}
--   {STALE, epoch}: it ended, or another one was faster · {NOT_FOUND} · {DATA_LOSS, part}
local function take_over_turn(keys, argv)
  local known_head, turn, epoch, owner = tonumber(argv[3]), argv[4], tonumber(argv[5]), argv[6]
  local meta, refusal = load(keys, argv[1], argv[2])
  if not meta then return refusal end
  local is_repeated = meta.turn == turn and meta.epoch == epoch + 1 and meta.owner == owner
  if not is_repeated then
    if meta.turn ~= turn or meta.epoch ~= epoch then return {'STALE', decimal(meta.epoch)} end
    if not last_entry(keys[4]) then return {'DATA_LOSS', 'log'} end
    meta.owner, meta.epoch = owner, epoch + 1
    redis.call('HSET', keys[1], 'owner', owner, 'epoch', decimal(meta.epoch))
  end
  local first, entries = entries_after(keys, meta, known_head)
  return {'TAKEN', decimal(meta.deadline - now_ms()), view(meta), first, entries}
end

-- KEYS meta, log. ARGV turn, epoch, id of the entry before, id, tokens
--   {LOGGED} · {STALE, epoch} · {NOT_FOUND} · {DATA_LOSS, part}: the entry before is not the last one
local function append_tokens(keys, argv)
  local turn, epoch, before, id = argv[1], tonumber(argv[2]), argv[3], argv[4]
  local values = redis.call('HMGET', keys[1], 'turn', 'epoch')
  if not values[1] then return {'NOT_FOUND'} end
  if values[1] ~= turn or tonumber(values[2]) ~= epoch then return {'STALE', values[2] or ''} end
  local last = last_entry(keys[2])
  if last == id then return {'LOGGED'} end -- again: the first answer was lost
  if last ~= before then return {'DATA_LOSS', 'log'} end
  redis.call('XADD', keys[2], id, 'tokens', argv[5])
  return {'LOGGED'}
end

-- ARGV tenant, session, key, turn, epoch, chain before, entry, rest, summary, rank, prompt tokens, output tokens,
--      how long the log is kept (ms), lease
--   {COMMITTED, view} · {STALE, epoch} · {NOT_FOUND} · {DATA_LOSS, part}
local function commit_turn(keys, argv)
  local key, turn, epoch, before, entry, rest = argv[3], argv[4], tonumber(argv[5]), argv[6], argv[7], argv[8]
  local prompt_tokens, output_tokens = tonumber(argv[11]), tonumber(argv[12])
  local meta, refusal = load(keys, argv[1], argv[2])
  if not meta then return refusal end
  if meta.turn ~= turn or meta.epoch ~= epoch then
    local outcome = outcome_of(keys, key)
    if outcome and outcome.status == 'done' and outcome.turn == turn and outcome.epoch == epoch then
      return {'COMMITTED', view(meta)} -- again: the first answer was lost
    end
    return {'STALE', decimal(meta.epoch)}
  end
  if meta.chain ~= before then return {'DATA_LOSS', 'chain'} end
  if rest ~= 'idle' and rest ~= 'waiting_for_tools' then return redis.error_reply('ERR rest is ' .. rest) end
  local outcome = cmsgpack.pack({status = 'done', hash = meta.hash, turn = turn, epoch = epoch, index = meta.head})

  redis.call('RPUSH', keys[2], entry)
  close_log(keys[4], 'committed', decimal(meta.head), argv[13])
  redis.call('HSET', keys[3], meta.key, outcome)
  write_meta(keys, {'head', decimal(meta.head + 1), 'num_keys', decimal(meta.num_keys + 1), 'rest', rest,
                    'chain', string.sub(entry, 1, 32), 'summary', argv[9], 'rank', argv[10], 'lease', argv[14],
                    'prompt_tokens', decimal(meta.prompt_tokens + prompt_tokens),
                    'output_tokens', decimal(meta.output_tokens + output_tokens)})
  return {'COMMITTED', view(load(keys, argv[1], argv[2]))}
end

-- Notes what a rank answered about the session's caches as they were at a head; the next commit brings its own.
-- ARGV tenant, session, head, lease
--   {NOTED} · {HEAD_MOVED, head} · {NOT_FOUND} · {DATA_LOSS, part}
local function note_lease(keys, argv)
  local meta, refusal = load(keys, argv[1], argv[2])
  if not meta then return refusal end
  if meta.head ~= tonumber(argv[3]) then return {'HEAD_MOVED', decimal(meta.head)} end
  redis.call('HSET', keys[1], 'lease', argv[4])
  return {'NOTED'}
end

-- Ends a turn and leaves the head as it was. An event that ends it for good answers every retry under the key; else the
-- key is forgotten and a retry runs anew under a higher epoch. Without an event it is as if the turn had never begun.
-- The event's number counts the events of what is logged, so it is refused where that is another entry's.
-- ARGV tenant, session, key, turn, epoch, event, '1' if for good, id of the log's last entry, how long it is kept (ms)
--   {ENDED, view, event it ended with} · {COMMITTED}: too late · {LOGGED, id of the last entry} · {STALE, epoch}
--   {NOT_FOUND} · {DATA_LOSS, part}
local function fail_turn(keys, argv)
  local key, turn, epoch, event, for_good = argv[3], argv[4], tonumber(argv[5]), argv[6], argv[7] == '1'
  local meta, refusal = load(keys, argv[1], argv[2])
  if not meta then return refusal end
  local last, kind, value = last_entry(keys[4])
  if meta.turn ~= turn or meta.epoch ~= epoch then
    local outcome = outcome_of(keys, key)
    if outcome and outcome.turn == turn and outcome.epoch == epoch then
      if outcome.status == 'done' then return {'COMMITTED'} end
      return {'ENDED', view(meta), outcome.event}
    end
    if meta.turn == '' and meta.epoch == epoch then
      return {'ENDED', view(meta), kind == 'ended' and value or event}
    end
    return {'STALE', decimal(meta.epoch)}
  end
  if event ~= '' and last and last ~= argv[8] then return {'LOGGED', last} end

  if event == '' then
    redis.call('DEL', keys[4])
  else
    close_log(keys[4], 'ended', event, argv[9])
  end
  if for_good then
    local outcome = {status = 'ended', hash = meta.hash, turn = turn, epoch = epoch, event = event}
    redis.call('HSET', keys[3], meta.key, cmsgpack.pack(outcome))
    write_meta(keys, {'num_keys', decimal(meta.num_keys + 1)})
  else
    write_meta(keys, {'num_keys', decimal(meta.num_keys)})
  end
  return {'ENDED', view(load(keys, argv[1], argv[2])), event}
end

-- Checks nothing, so that a damaged session can be deleted too: the keys name the tenant. The logs that its turns left
-- go with it; their names share the session's tag, but who deletes does not know them.
--   {DELETED|ABSENT, created, or '' where that is lost}
local function delete_session(keys, argv)
  local created, doomed = false, {keys[1], keys[2], keys[3]}
  local log_of = string.gsub(keys[1], 'meta$', 'log:')
  if redis.call('TYPE', keys[1]).ok == 'hash' then
    created = redis.call('HGET', keys[1], 'created')
    doomed[#doomed + 1] = log_of .. (redis.call('HGET', keys[1], 'turn') or '')
  end
  if redis.call('TYPE', keys[3]).ok == 'hash' then
    for _, packed in ipairs(redis.call('HVALS', keys[3])) do
      local is_whole, outcome = pcall(cmsgpack.unpack, packed)
      if is_whole and type(outcome) == 'table' and outcome.turn then doomed[#doomed + 1] = log_of .. tostring(outcome.turn) end
    end
  end
  local num_deleted = 0
  for _, key in ipairs(doomed) do num_deleted = num_deleted + redis.call('UNLINK', key) end
  return {num_deleted > 0 and 'DELETED' or 'ABSENT', created or ''}
end

-- Removes a peer from the directory if its beat still starts as the caller saw it: a successor's entry stays.
-- KEYS records, beats (both hashes by peer id). ARGV peer id, start of the beat.   1 or 0: removed or not
local function remove_peer(keys, argv)
  local beat = redis.call('HGET', keys[2], argv[1])
  if beat and string.sub(beat, 1, #argv[2]) ~= argv[2] then return 0 end
  redis.call('HDEL', keys[2], argv[1])
  return redis.call('HDEL', keys[1], argv[1])
end

-- KEYS records, beats. ARGV peer id, record, beat
local function register_peer(keys, argv)
  redis.call('HSET', keys[1], argv[1], argv[2])
  return redis.call('HSET', keys[2], argv[1], argv[3])
end

-- KEYS records, beats. ARGV peer id, beat, its start (the instance).
--   1 or 0: whether the directory holds this very process; its beat is written only if so
local function beat_peer(keys, argv)
  if redis.call('HEXISTS', keys[1], argv[1]) == 0 then return 0 end
  local beat = redis.call('HGET', keys[2], argv[1])
  if beat and string.sub(beat, 1, #argv[3]) ~= argv[3] then return 0 end
  redis.call('HSET', keys[2], argv[1], argv[2])
  return 1
end

local function counts_of(stored, num_buckets)
  local counts, total = {}, 0
  for number in string.gmatch(stored or '', '%d+') do counts[#counts + 1] = tonumber(number) end
  for i = 1, num_buckets do
    counts[i] = counts[i] or 0
    total = total + counts[i]
  end
  return counts, total
end

-- Counts a wait for the results of tools. Old waits fade: at 64 all counts of the tool are halved.
-- KEYS hash by tool name: numbers of waits by bucket, in decimal, with commas between
-- ARGV bucket (from 0), number of buckets, most tools, time to live (ms), tool names
--   number of tools
local function note_wait(keys, argv)
  local bucket, num_buckets, most, noted = tonumber(argv[1]) + 1, tonumber(argv[2]), tonumber(argv[3]), {}
  for i = 5, #argv do
    local counts, total = counts_of(redis.call('HGET', keys[1], argv[i]), num_buckets)
    for j = 1, num_buckets do
      if total >= 64 then counts[j] = math.floor(counts[j] / 2) end
    end
    counts[bucket] = counts[bucket] + 1
    redis.call('HSET', keys[1], argv[i], table.concat(counts, ','))
    noted[argv[i]] = true
  end
  while redis.call('HLEN', keys[1]) > most do
    local least, fewest = nil, math.huge
    local stored = redis.call('HGETALL', keys[1])
    for i = 1, #stored, 2 do
      local _, total = counts_of(stored[i + 1], num_buckets)
      if noted[stored[i]] then total = total + 1000 end
      if total < fewest then least, fewest = stored[i], total end
    end
    redis.call('HDEL', keys[1], least)
  end
  redis.call('PEXPIRE', keys[1], argv[4])
  return redis.call('HLEN', keys[1])
end

redis.register_function('seamount_1_create_session', create_session)
redis.register_function('seamount_1_update_session', update_session)
redis.register_function{function_name = 'seamount_1_get_session', callback = get_session, flags = {'no-writes'}}
redis.register_function('seamount_1_begin_turn', begin_turn)
redis.register_function('seamount_1_take_over_turn', take_over_turn)
redis.register_function{function_name = 'seamount_1_append_tokens', callback = append_tokens, flags = {'allow-oom'}}
redis.register_function{function_name = 'seamount_1_commit_turn', callback = commit_turn, flags = {'allow-oom'}}
redis.register_function('seamount_1_note_lease', note_lease)
redis.register_function{function_name = 'seamount_1_fail_turn', callback = fail_turn, flags = {'allow-oom'}}
redis.register_function('seamount_1_note_wait', note_wait)
redis.register_function{function_name = 'seamount_1_delete_session', callback = delete_session, flags = {'allow-oom'}}
redis.register_function{function_name = 'seamount_1_register_peer', callback = register_peer, flags = {'allow-oom'}}
redis.register_function{function_name = 'seamount_1_beat_peer', callback = beat_peer, flags = {'allow-oom'}}
redis.register_function{function_name = 'seamount_1_remove_peer', callback = remove_peer, flags = {'allow-oom'}}
