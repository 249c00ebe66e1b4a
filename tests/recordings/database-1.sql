BEGIN TRANSACTION;
CREATE TABLE account (
	id VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	digest VARCHAR, 
	ending VARCHAR NOT NULL, 
	made DATETIME NOT NULL, 
	revoked DATETIME, 
	requests_per_minute INTEGER, 
	tokens_per_minute BIGINT, 
	concurrency INTEGER, 
	spend_limit BIGINT, 
	spent BIGINT NOT NULL, 
	reserved BIGINT NOT NULL, 
	CONSTRAINT pk_account PRIMARY KEY (id), 
	CONSTRAINT uq_account_digest UNIQUE (digest)
);
INSERT INTO "account" VALUES('local','local',NULL,'','2026-05-01 12:00:00.000000',NULL,NULL,NULL,NULL,NULL,0,0);
INSERT INTO "account" VALUES('key_d2878fcc37ca1a49','laptop','489cb190d5994d09ea39ba3d8e7ca9a1b9528b3478aa1ee203c2d048a39ee479','kkkk','2026-05-01 12:00:00.000000',NULL,NULL,NULL,NULL,1000000000000,11480000,0);
CREATE TABLE charge (
	id INTEGER NOT NULL, 
	owner VARCHAR NOT NULL, 
	server VARCHAR NOT NULL, 
	request VARCHAR NOT NULL, 
	model VARCHAR NOT NULL, 
	served VARCHAR NOT NULL, 
	begun DATETIME NOT NULL, 
	ended DATETIME, 
	outcome VARCHAR, 
	reserved BIGINT NOT NULL, 
	hit_tokens INTEGER NOT NULL, 
	miss_tokens INTEGER NOT NULL, 
	output_tokens INTEGER NOT NULL, 
	hit_price BIGINT NOT NULL, 
	miss_price BIGINT NOT NULL, 
	output_price BIGINT NOT NULL, 
	cost BIGINT NOT NULL, 
	CONSTRAINT pk_charge PRIMARY KEY (id), 
	CONSTRAINT fk_charge_owner FOREIGN KEY(owner) REFERENCES account (id)
);
INSERT INTO "charge" VALUES(1,'key_d2878fcc37ca1a49','a1135c662472d609','r1','deepseek-v4-flash','v4-nano','2026-05-01 12:00:00.000000','2026-05-01 12:00:00.000000','stop',999999840000,40,60,7,28000,140000,280000,11480000);
CREATE TABLE conversation (
	id VARCHAR NOT NULL, 
	owner VARCHAR NOT NULL, 
	title TEXT NOT NULL, 
	folded TEXT NOT NULL, 
	settings JSON NOT NULL, 
	head VARCHAR, 
	created DATETIME NOT NULL, 
	changed DATETIME NOT NULL, 
	CONSTRAINT pk_conversation PRIMARY KEY (id)
);
INSERT INTO "conversation" VALUES('c1','local','Greeting','greeting','{}',NULL,'2026-05-01 12:00:00.000000','2026-05-01 12:00:00.000000');
CREATE TABLE conversation_message (
	conversation_id VARCHAR NOT NULL, 
	id VARCHAR NOT NULL, 
	parent VARCHAR, 
	role VARCHAR NOT NULL, 
	content TEXT NOT NULL, 
	folded TEXT NOT NULL, 
	details JSON NOT NULL, 
	created DATETIME NOT NULL, 
	CONSTRAINT pk_conversation_message PRIMARY KEY (conversation_id, id), 
	CONSTRAINT fk_conversation_message_conversation_id FOREIGN KEY(conversation_id) REFERENCES conversation (id) ON DELETE CASCADE
);
INSERT INTO "conversation_message" VALUES('c1','m1',NULL,'user','Hello','hello','{}','2026-05-01 12:00:00.000000');
CREATE TABLE schema_version (
	version INTEGER NOT NULL, 
	CONSTRAINT pk_schema_version PRIMARY KEY (version)
);
INSERT INTO "schema_version" VALUES(1);
CREATE TABLE server_life (
	id VARCHAR NOT NULL, 
	seen DATETIME NOT NULL, 
	CONSTRAINT pk_server_life PRIMARY KEY (id)
);
INSERT INTO "server_life" VALUES('a1135c662472d609','2026-05-01 12:00:00.000000');
CREATE INDEX ix_conversation_owner ON conversation (owner);
CREATE INDEX ix_conversation_changed ON conversation (changed);
CREATE INDEX ix_charge_owner_ended ON charge (owner, ended);
CREATE INDEX ix_charge_owner_begun ON charge (owner, begun);
CREATE INDEX ix_charge_server ON charge (server);
COMMIT;
